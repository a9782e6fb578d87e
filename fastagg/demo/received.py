"""What clients were handed in a round, by their rank, beside the least distance that it allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table
from rich.text import Text

from fastagg.adapter import Adapter
from fastagg.cli.tables import table
from fastagg.federated.report.metrics import ClientRow
from fastagg.federated.report.recorded_run import RecordedRun
from fastagg.federated.simulation.run_folder import RunFolder

ROUNDING = 1e-6  # relative distance below which only float32's rounding is left


@dataclass(frozen=True)
class Received:
    """What the clients of one rank have after a round; all of them where they merge the stack.

    rank: of the adapter, the stack's where ``stacked``.
    distance: |received - dW| / |dW| over all modules.
    optimum: the least distance of any adapter of that rank.
    loss_before, loss: means over these clients, each on its own held-out text, in nats per byte.
    """

    method: str
    rank: int
    clients: tuple[str, ...]
    distance: float
    optimum: float
    loss_before: float
    loss: float
    stacked: bool


def received(runs: Sequence[RecordedRun], number: int = 1) -> tuple[Received, ...]:
    """By method, and by falling rank. In the first round all methods have the same updates."""
    return tuple(each for run in runs for each in _of_run(run, number))


def _of_run(run: RecordedRun, number: int) -> list[Received]:
    before = {row.client: row.held_out_loss for row in run.clients if row.round == 0}
    merged = RunFolder(run.folder).merged(number)
    stacked = Adapter.load(merged) if merged.is_dir() else None
    by_rank: dict[int, list[ClientRow]] = {}
    for row in run.clients:
        if row.round == number:
            by_rank.setdefault(0 if stacked else row.rank or 0, []).append(row)
    found = []
    for rank, rows in sorted(by_rank.items(), reverse=True):
        if stacked is not None:
            rank = max(stacked.rank(module) for module in stacked.modules)
        # Clients of one rank differ in nothing here, so they are handed the same.
        found.append(
            Received(
                method=run.method,
                rank=rank,
                clients=tuple(row.client for row in rows),
                distance=_known(rows[0].distance),
                optimum=_known(rows[0].optimal_distance),
                loss_before=fmean(_known(before[row.client]) for row in rows),
                loss=fmean(_known(row.held_out_loss) for row in rows),
                stacked=stacked is not None,
            )
        )
    return found


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def received_table(found: Sequence[Received], number: int = 1) -> Table:
    """A section per method, a row per rank."""
    right = ("distance\nfrom dW", "least at\nits rank", "held-out loss\nbefore -> after")
    made = table(
        f"What clients have after round {number} (dW: the exact sum of their updates, by examples)",
        *("method", "to rank", *right),
        right=right,
    )
    method = ""
    for each in found:
        if each.method != method:
            made.add_section()
        made.add_row(
            each.method if each.method != method else "",
            _receivers(each),
            _distance(each),
            _figure(each.optimum),
            f"{each.loss_before:.4f} -> {each.loss:.4f}",
        )
        method = each.method
    return made


def _receivers(each: Received) -> str:
    many = len(each.clients)
    if each.stacked:
        return f"all {many}, merged: {each.rank}"
    return f"{each.rank} (x{many})" if many > 1 else str(each.rank)


def _distance(each: Received) -> Text:
    """Green where it is the least that the rank allows, red where it is not."""
    style = "green" if each.distance - each.optimum < ROUNDING else "red"
    return Text(_figure(each.distance), style=style)


def _figure(value: float) -> str:
    return f"{value:.4f}" if value >= ROUNDING else "0"
