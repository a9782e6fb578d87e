"""The headline figures of runs, as numbers and as the table that people see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import numpy as np

from fastagg.byte_sizes import format_bytes
from fastagg.federated.report.recorded_run import RecordedRun

MISSING = "–"

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class RunSummary:
    """Losses are held-out, in nats per token; scores and distances are of the last round that has any.

    quartiles: of the clients' losses, in the last round that has any.
    distance: mean over clients of |received - dW| / |dW|.
    aggregation_share: of all seconds of all rounds after 0.
    """

    run: str
    method: str
    rounds: int
    clients: int
    first_loss: float | None
    loss: float | None
    best_loss: float | None
    perplexity: float | None
    quartiles: tuple[float, float, float] | None
    exact_match: float | None
    rouge_l: float | None
    distance: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    aggregation_share: float | None
    failures: int


def summarise(run: RecordedRun) -> RunSummary:
    """The figures of one run."""
    losses = [row.loss for row in run.rounds if row.loss is not None]
    spread = run.held_out_losses()
    seconds = sum(row.seconds.total for row in run.trained)
    aggregating = sum(row.seconds.aggregate for row in run.trained)
    return RunSummary(
        run=run.label,
        method=run.method,
        rounds=max((row.round for row in run.rounds), default=0),
        # A name with a dot is nobody's: the reference's that has the examples of all.
        clients=sum(not name.startswith(".") for name in run.client_names)
        or max((row.participants for row in run.rounds), default=0),
        first_loss=losses[0] if losses else None,
        loss=losses[-1] if losses else None,
        best_loss=min((loss for loss in losses if math.isfinite(loss)), default=None),
        perplexity=last(row.perplexity for row in run.rounds),
        quartiles=quartiles(list(spread.values())[-1]) if spread else None,
        exact_match=last(row.exact_match for row in run.rounds),
        rouge_l=last(row.rouge_l for row in run.rounds),
        distance=_mean_distance(run),
        bytes_up=sum(row.bytes_up for row in run.rounds),
        bytes_down=sum(row.bytes_down for row in run.rounds),
        seconds=seconds,
        aggregation_share=aggregating / seconds if seconds > 0 else None,
        failures=sum(len(row.failures) for row in run.rounds),
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


@dataclass(frozen=True)
class Column:
    """A column of the table; one that `says` nothing of any run is dropped."""

    heading: str
    text: Callable[[RunSummary], str]
    says: Callable[[RunSummary], bool] = lambda run: True
    numeric: bool = True


COLUMNS = (
    Column("run", lambda run: run.run, numeric=False),
    Column("method", lambda run: run.method, lambda run: run.method != run.run, numeric=False),
    Column("rounds", lambda run: str(run.rounds)),
    Column("clients", lambda run: str(run.clients)),
    Column("loss before", lambda run: number(run.first_loss)),
    Column("loss after", lambda run: number(run.loss)),
    Column(
        "middle half of clients", lambda run: _half(run.quartiles), lambda run: run.quartiles is not None
    ),
    Column(
        "perplexity", lambda run: number(run.perplexity, ".4g"), lambda run: run.perplexity is not None
    ),
    Column(
        "exact match",
        lambda run: number(run.exact_match, ".1%"),
        lambda run: run.exact_match is not None,
    ),
    Column("ROUGE-L", lambda run: number(run.rouge_l), lambda run: run.rouge_l is not None),
    Column(
        "distance from dW",
        lambda run: number(run.distance, ".3g"),
        lambda run: run.distance is not None,
    ),
    Column("up", lambda run: format_bytes(run.bytes_up)),
    Column("down", lambda run: format_bytes(run.bytes_down)),
    Column("time", lambda run: _duration(run.seconds)),
    Column("aggregate", lambda run: number(run.aggregation_share, ".2%")),
    Column("failures", lambda run: str(run.failures)),
)


def columns_for(summaries: Sequence[RunSummary]) -> tuple[Column, ...]:
    """Those columns that say something of these runs."""
    return tuple(column for column in COLUMNS if any(map(column.says, summaries)))


def number(value: float | None, form: str = ".4f") -> str:
    """A number for people; a dash for one that was not recorded."""
    return MISSING if value is None else format(value, form)


def last(values: Iterable[Number | None]) -> Number | None:
    """The last that was recorded."""
    found = [value for value in values if value is not None]
    return found[-1] if found else None


def _mean_distance(run: RecordedRun) -> float | None:
    rows = [(row.round, row.distance) for row in run.clients if row.distance is not None]
    latest = max((place for place, _ in rows), default=None)
    return fmean(value for place, value in rows if place == latest) if rows else None


def _half(values: tuple[float, float, float] | None) -> str:
    return MISSING if values is None else f"{values[0]:.3f}–{values[2]:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
