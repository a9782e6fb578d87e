"""What an aggregation did, for people and programs: sizes, times, and how good the hand-outs are."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SCHEMA", "ClientReport", "ModuleReport", "Report", "SkippedClient", "Stopwatch"]

SCHEMA = 2
# Schema 1 had no condensed_error.
_READABLE = (1, SCHEMA)

STAGES = ("read", "validate", "fold", "stack", "svd", "redistribute", "write")


@dataclass
class ClientReport:
    """One client: its weight, its largest rank, the bytes it sent, and what it was handed.

    Attributes:
        handout: the folder below the output, None where nothing was written.
        handout_bytes: the tensors' bytes of it.
    """

    client: str
    weight: float
    rank: int
    bytes: int
    handout: str | None = None
    handout_bytes: int | None = None


@dataclass
class SkippedClient:
    """A client that was left out, where that was asked for, and why."""

    client: str
    folder: str
    reason: str


@dataclass
class ModuleReport:
    """One module. Figures that were not computed are None.

    Attributes:
        shape: of the base weight.
        clients: how many brought it.
        rank_sum: R, the sum of their ranks.
        route: how the hand-out was computed.
        seconds: its share of the time that the module's batch took.
        norm: |dW|_F of what was handed out at full rank.
        kept: rank -> share of |dW|_F^2 that it keeps.
        certificate: upper bound of (error^2 - optimal^2) / |dW|_F^2 at the largest rank.
        numerical_rank: columns that carry weight.
        condensed_error: upper bound of |dW of the clients' own adapters - dW|_F / |dW|_F, what
            condensing between the levels of a tree cost; 0 where nothing was condensed.
    """

    module: str
    shape: tuple[int, ...]
    clients: int
    rank_sum: int
    route: str | None = None
    seconds: float = 0.0
    norm: float | None = None
    kept: dict[int, float] = field(default_factory=dict)
    certificate: float | None = None
    numerical_rank: int | None = None
    condensed_error: float | None = None


@dataclass
class Report:
    """One round, as :attr:`fastagg.Aggregate.report` and ``report.json`` have it.

    Attributes:
        seconds: by stage: read, validate, fold (into the accumulator), stack, svd, redistribute,
            write. Stages that did not run are 0.
        bytes_read: of all adapters;  bytes_written: of all files of the hand-outs.
        peak_memory: bytes, the largest seen between the stages; ``peak_memory_of`` says of what:
            RssAnon (mapped files are not in it) or, where the system does not tell, ru_maxrss; on a GPU
            memory_allocated, which is torch's there.
        whole_tensors: keys of the tensors that were averaged plainly.
        base_effect: what the hand-out does to the base weights.
        skipped: clients that were left out because their updates are invalid.
    """

    method: str
    accumulator: str
    missing: str
    base_effect: str
    clients: list[ClientReport] = field(default_factory=list)
    modules: list[ModuleReport] = field(default_factory=list)
    whole_tensors: list[str] = field(default_factory=list)
    skipped: list[SkippedClient] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    bytes_read: int = 0
    bytes_written: int = 0
    peak_memory: int = 0
    peak_memory_of: str = "RssAnon"
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; ranks become text, the schema comes first."""
        fields = dataclasses.asdict(self)
        for module in fields["modules"]:
            module["shape"] = list(module["shape"])
            module["kept"] = {str(rank): module["kept"][rank] for rank in sorted(module["kept"])}
        return {"schema": fields.pop("schema"), **fields}

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Report:
        """Reads what :meth:`to_dict` gave.

        Raises:
            ValueError: another schema.
        """
        if fields.get("schema") not in _READABLE:
            raise ValueError(
                f"a report of schema {SCHEMA} was expected, got {fields.get('schema')!r}"
            )
        values = {**fields, "schema": SCHEMA}
        values["clients"] = [ClientReport(**client) for client in values["clients"]]
        values["skipped"] = [SkippedClient(**client) for client in values["skipped"]]
        values["modules"] = [
            ModuleReport(
                **{
                    **module,
                    "shape": tuple(module["shape"]),
                    "kept": {int(rank): share for rank, share in module["kept"].items()},
                }
            )
            for module in values["modules"]
        ]
        return cls(**values)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Reads what :meth:`to_json` gave."""
        return cls.from_dict(json.loads(text))


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the block's time to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            with self._lock:
                self.seconds[name] += seconds
