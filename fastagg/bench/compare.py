"""What changed from one record to another, beyond the noise of both.

A row is slower only where its median moved further than the noise between fresh inputs does, and where
the quartiles of old and new do not overlap either; an error is worse only where it doubled and is above
rounding. What the limits did beside it tells a slower machine from slower code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastagg.bench.noise import noise_of, noise_of_pair
from fastagg.bench.rates import is_of_the_machine
from fastagg.bench.record import Record, Row
from fastagg.errors import InvalidInput

__all__ = ["Accuracy", "Comparison", "Matched", "Speed", "compare"]

Speed = Literal["slower", "faster", "same"]
Accuracy = Literal["less accurate", "more accurate", "same"]

# Rounding of float64 alone moves errors that are below.
_ROUNDING = 1e-12
_WORSE = 2.0

_MUST_AGREE = ("device", "dtype", "factors")
_BETTER_AGREE = ("threads", "effort", "seed")
_OF_THE_MACHINE = ("cpu", "gpu", "cores", "torch")


@dataclass(frozen=True)
class Matched:
    """A row of the old record and the row of the new one with the same key."""

    old: Row
    new: Row
    noise: float
    """Of the ratio."""

    @property
    def ratio(self) -> float:
        """New seconds over old."""
        return self.new.seconds / self.old.seconds

    @property
    def speed(self) -> Speed:
        """Beyond the noise, and with quartiles apart."""
        if self.ratio > 1 + self.noise and self.new.low > self.old.high:
            return "slower"
        if 1 / self.ratio > 1 + self.noise and self.new.high < self.old.low:
            return "faster"
        return "same"

    @property
    def accuracy(self) -> Accuracy:
        """Of the error and of the orthogonality; what got worse counts before what got better."""
        pairs = (
            (self.old.error, self.new.error),
            (self.old.orthogonality, self.new.orthogonality),
        )
        if any(_is_worse(new, old) for old, new in pairs):
            return "less accurate"
        if any(_is_worse(old, new) for old, new in pairs):
            return "more accurate"
        return "same"

    @property
    def rescaled(self) -> bool:
        """Whether other numbers of modules were timed: one of the two is extrapolated further."""
        return self.old.timed_modules != self.new.timed_modules

    @property
    def changed(self) -> bool:
        """In speed or accuracy."""
        return self.speed != "same" or self.accuracy != "same"

    @property
    def worse(self) -> bool:
        """In speed or accuracy."""
        return self.speed == "slower" or self.accuracy == "less accurate"


@dataclass(frozen=True)
class Comparison:
    """Two records, row by row."""

    old: Record
    new: Record
    matched: tuple[Matched, ...]
    """In the order of the old record."""
    missing: tuple[Row, ...]
    """Rows that only the old record has."""
    added: tuple[Row, ...]
    """Rows that only the new record has."""
    notes: tuple[str, ...]
    """Sentences on what else differs."""

    @property
    def worse(self) -> bool:
        """Whether a row of FastAgg is slower or less accurate. Rows that are missing are none: a record
        may be of fewer cases on purpose."""
        return any(pair.worse for pair in self.matched if pair.new.kind == "fastagg")

    def document(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {
            "worse": self.worse,
            "old": _origin(self.old),
            "new": _origin(self.new),
            "notes": list(self.notes),
            "rows": [
                {
                    **_key(pair.new),
                    "kind": pair.new.kind,
                    "speed": pair.speed,
                    "accuracy": pair.accuracy,
                    "ratio": pair.ratio,
                    "noise": pair.noise,
                    "rescaled": pair.rescaled,
                    "old": _figures(pair.old),
                    "new": _figures(pair.new),
                }
                for pair in self.matched
            ],
            "missing": [_key(row) for row in self.missing],
            "added": [_key(row) for row in self.added],
        }


def compare(old: Record, new: Record) -> Comparison:
    """Compares two records.

    Raises:
        InvalidInput: they are of another device, dtype or kind of factors, so that no row compares.
    """
    for field in _MUST_AGREE:
        expected, got = getattr(old.settings, field), getattr(new.settings, field)
        if expected != got:
            raise InvalidInput(
                "the records are of different measurements",
                field=field,
                expected=f"{expected} as in the old record",
                got=f"{got} in the new one",
                cure=f"Measure one of them again with --{field} as in the other",
            )
    before = {row.key: row for row in old.rows}
    after = {row.key: row for row in new.rows}
    matched = tuple(
        Matched(row, after[key], noise_of_pair(noise_of(row, old), noise_of(after[key], new)))
        for key, row in before.items()
        if key in after
    )
    return Comparison(
        old,
        new,
        matched,
        tuple(row for key, row in before.items() if key not in after),
        tuple(row for key, row in after.items() if key not in before),
        (*_on_the_records(old, new), *_on_the_limits(matched, old, new)),
    )


def _is_worse(value: float | None, than: float | None) -> bool:
    if than is None or math.isnan(than):
        return False
    # JSON has no not-a-number: an error that is one comes back as none.
    if value is None or math.isnan(value):
        return True
    return value > _WORSE * than and value > _ROUNDING


def _on_the_records(old: Record, new: Record) -> list[str]:
    notes = [
        f"The {name} record is incomplete: its run has not ended, or was ended."
        for name, record in (("old", old), ("new", new))
        if not record.complete
    ]
    for part, fields in (("settings", _BETTER_AGREE), ("machine", _OF_THE_MACHINE)):
        for field in fields:
            was, now = getattr(getattr(old, part), field), getattr(getattr(new, part), field)
            if was != now:
                notes.append(f"{field}: {_named(was)} in the old record, {_named(now)} in the new.")
    return notes


def _named(value: object) -> str:
    return "none" if value is None else str(value)


def _on_the_limits(matched: Sequence[Matched], old: Record, new: Record) -> list[str]:
    """One sentence for each case and op whose limits moved."""
    moved: dict[tuple[str, str], list[Matched]] = {}
    for pair in matched:
        if pair.new.kind == "limit" and pair.speed != "same":
            moved.setdefault((pair.new.case, pair.new.op), []).append(pair)
    mover = "machine" if old.machine.torch == new.machine.torch else "machine or torch"
    notes = []
    for (case, op), pairs in moved.items():
        machine = [pair for pair in pairs if is_of_the_machine(pair.new)]
        others = [pair for pair in pairs if not is_of_the_machine(pair.new)]
        if machine:
            text = _joined([_moved(pair) for pair in machine])
            notes.append(f"{case}, {op}: the machine's {text}: the {mover} changed, not the code.")
        if others:
            notes.append(f"{case}, {op}: the limit {_joined([_moved(pair) for pair in others])}.")
    return notes


def _moved(pair: Matched) -> str:
    times = max(pair.ratio, 1 / pair.ratio)
    shown = f"{times:.2f}" if times < 1.1 else f"{times:.1f}"
    return f"{pair.new.contender} is {shown} times {pair.speed}"


def _joined(texts: Sequence[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} and {last}" if most else last


def _key(row: Row) -> dict[str, str]:
    return {"case": row.case, "op": row.op, "contender": row.contender}


def _figures(row: Row) -> dict[str, float | int | None]:
    return {
        "seconds": row.seconds,
        "low": row.low,
        "high": row.high,
        "noise": row.noise,
        "error": row.error,
        "orthogonality": row.orthogonality,
        "timed_modules": row.timed_modules,
        "modules": row.modules,
    }


def _origin(record: Record) -> dict[str, Any]:
    return {
        "complete": record.complete,
        "machine": record.machine.model_dump(),
        "settings": record.settings.model_dump(),
    }
