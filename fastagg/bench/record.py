"""What a run of the benchmarks leaves: a versioned document that comes back as it was written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastagg.bench.contender import Kind
from fastagg.bench.workload import FactorKind
from fastagg.errors import InvalidInput
from fastagg.whole_file import write_whole

__all__ = ["SCHEMA", "LeftOut", "Machine", "Record", "Row", "Settings", "read_record", "write_record"]

SCHEMA = 2
"""Of the document; a change that a reader must know of raises it. (1 was never a command's.)"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Strict):
    """What a reader must know of where a record was made."""

    date: str
    system: str
    cpu: str
    capability: str
    """The vector instructions that torch uses."""
    cores: int
    memory_bytes: int | None
    python: str
    torch: str
    fastagg: str
    commit: str | None
    """Of the checkout that was measured, with "+" where it had changes."""
    gpu: str | None = None
    cuda: str | None = None
    multiprocessors: int | None = None
    l2_bytes: int | None = None


class Settings(_Strict):
    """How it was measured."""

    device: str
    threads: int
    effort: Literal["quick", "standard", "full"]
    dtype: str
    factors: FactorKind
    seed: int


class Row(_Strict):
    """One contender of one operation in one case."""

    case: str
    op: str
    contender: str
    kind: Kind
    seconds: float = Field(gt=0)
    """The median of all turns, for all modules of the case."""
    low: float
    high: float
    """The quartiles."""
    turns: int
    noise: float | None
    """How far the medians of two runs with fresh inputs lie apart: max / min - 1. None: one run only."""
    modules: int
    """Of the case."""
    timed_modules: int
    """Where fewer were timed, `seconds` is scaled by the counted work."""
    clients: int
    rows: int
    """R."""
    bytes_in: float
    """Of all factors of all modules."""
    bytes: float
    flops: float
    wide_flops: float
    """Counted, not measured: :class:`fastagg.bench.contender.Work`."""
    share_of_limit: float | None
    """What the counted work would take at the rates of the op's limits, over `seconds`."""
    peak_bytes: int | None
    """Memory beyond the inputs, of the modules that were timed."""
    error: float | None
    orthogonality: float | None
    ratios: dict[str, float] = {}
    """Another contender's seconds over this one's: how many times faster this one is."""

    @property
    def scaled(self) -> bool:
        """Whether fewer modules were timed than the case has."""
        return self.timed_modules < self.modules

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is a row of."""
        return (self.case, self.op, self.contender)


class LeftOut(_Strict):
    """A contender that was not measured, and why."""

    case: str
    op: str
    contender: str
    reason: str


class Record(_Strict):
    """All of a run."""

    schema_version: Literal[2] = 2
    complete: bool
    """False in the file of a run that has not ended yet, or was ended."""
    machine: Machine
    settings: Settings
    rows: list[Row]
    left_out: list[LeftOut] = []

    def of(self, case: str, op: str) -> list[Row]:
        """The rows of one table."""
        return [row for row in self.rows if (row.case, row.op) == (case, op)]

    def tables(self) -> list[tuple[str, str]]:
        """(case, op) of each table, in the order of measuring."""
        return list(dict.fromkeys((row.case, row.op) for row in self.rows))


def write_record(path: str | os.PathLike[str], record: Record) -> None:
    """Writes a record, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, record.model_dump_json(indent=1) + "\n")


def read_record(path: str | os.PathLike[str]) -> Record:
    """Reads a record.

    Raises:
        InvalidInput: it is not one, or of another schema; the message names the first field at fault.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{path} is not a record of `fastagg bench`",
            expected="a JSON document",
            got=str(error),
            cure="Make one with `fastagg bench --json > record.json`",
        ) from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA:
        raise InvalidInput(
            f"{path} is not a record that this version reads",
            field="schema_version",
            expected=SCHEMA,
            got=version,
            cure="Measure again with this version of fastagg",
        )
    try:
        return Record.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(
            f"{path} is not a whole record",
            field=".".join(map(str, first["loc"])),
            expected=first["msg"],
        ) from None
