"""The lines of metrics.jsonl as typed rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastagg.errors import InvalidInput, short

# Fields that a later version adds do not keep this one from reading its runs.
_LENIENT = ConfigDict(frozen=True, extra="ignore")


class Seconds(BaseModel):
    """Wall time of a round by phase."""

    model_config = _LENIENT

    train: float = 0.0
    aggregate: float = 0.0
    evaluate: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Of all phases."""
        return self.train + self.aggregate + self.evaluate + self.other


class RoundRow(BaseModel):
    """A round as a whole; round 0 is before any training.

    loss: held-out, in nats per token of the answer; None where the round was not evaluated, and NaN or
        infinite where training diverged.
    failures: client -> why it had no update.
    bytes_up, bytes_down: from and to all clients.
    """

    model_config = _LENIENT

    kind: Literal["round"] = "round"
    method: str
    round: int = Field(ge=0)
    loss: float | None = None
    perplexity: float | None = None
    participants: int = 0
    failures: Mapping[str, str] = {}
    exact_match: float | None = None
    rouge_l: float | None = None
    seconds: Seconds = Seconds()
    bytes_up: int = 0
    bytes_down: int = 0


class ClientRow(BaseModel):
    """A client in a round.

    distance, optimal_distance: |received - dW| / |dW|, and the least that its rank allows; dW is the
        exact sum of the round's updates, or what a server optimiser makes of it.
    """

    model_config = _LENIENT

    kind: Literal["client"] = "client"
    method: str
    round: int = Field(ge=0)
    client: str
    rank: int | None = None
    participated: bool = False
    train_loss: float | None = None
    steps: int | None = None
    held_out_loss: float | None = None
    distance: float | None = None
    optimal_distance: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    train_seconds: float | None = None


class Metrics(BaseModel):
    """All rows, in the order of the file, and what a reader should know of it."""

    model_config = ConfigDict(frozen=True)

    rounds: tuple[RoundRow, ...]
    clients: tuple[ClientRow, ...]
    notes: tuple[str, ...] = ()


def read_metrics(path: Path) -> Metrics:
    """Reads metrics.jsonl.

    A run killed while it wrote leaves an incomplete last line: it is left out, and a note says so.

    Raises:
        InvalidInput: not readable, or another line that is none; it names the line and the field.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rounds: list[RoundRow] = []
    clients: list[ClientRow] = []
    notes: list[str] = []
    for number, line in numbered:
        try:
            record = json.loads(line)
        except ValueError:  # also bytes that are no UTF-8
            if number != numbered[-1][0]:
                raise InvalidInput(f"line {number} of {path} is no JSON", got=_shown(line)) from None
            notes.append(f"line {number} of {path.name} is incomplete and was left out")
            continue
        row = _row(record, f"line {number} of {path}")
        if isinstance(row, RoundRow):
            rounds.append(row)
        else:
            clients.append(row)
    return Metrics(rounds=tuple(rounds), clients=tuple(clients), notes=tuple(notes))


def _row(record: Any, where: str) -> RoundRow | ClientRow:
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in ("round", "client"):
        raise InvalidInput(
            f"{where} is no row of metrics",
            field="kind",
            expected="'round' or 'client'",
            got=short(kind),
        )
    try:
        return RoundRow.model_validate(record) if kind == "round" else ClientRow.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(
            f"{where}: {first['msg']}",
            field=".".join(str(part) for part in first["loc"]),
            got=short(first["input"]),
        ) from None


def _shown(line: bytes) -> str:
    return short(line.decode("utf-8", errors="replace"))
