"""What clients were handed in a round, measured in float64 against the exact sum of their updates.

From the folders of a run alone and without this package's aggregation: the demo's yardstick.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastagg.adapter import Adapter
from fastagg.cli.tables import table
from fastagg.federated.report.recorded_run import RecordedRun

MERGED = "merged"
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
    first = _round(runs[0], number)
    exact = _Exact.of(first / "updates", json.loads((first / "weights.json").read_text("utf-8")))
    return tuple(each for run in runs for each in _of_run(run, number, exact))


def _of_run(run: RecordedRun, number: int, exact: _Exact) -> list[Received]:
    losses = {(row.round, row.client): row.held_out_loss or math.nan for row in run.clients}
    adapters = _round(run, number) / "adapters"
    stacked = (adapters / MERGED).is_dir()
    receivers: dict[int, list[str]] = {}
    for row in run.clients:
        if row.round == number:
            receivers.setdefault(0 if stacked else row.rank or 0, []).append(row.client)
    found = []
    for _, clients in sorted(receivers.items(), reverse=True):
        # Clients of one rank differ in nothing here, so they are handed the same.
        adapter = Adapter.load(adapters / (MERGED if stacked else clients[0]))
        rank = max(adapter.rank(module) for module in adapter.modules)
        found.append(
            Received(
                method=run.method,
                rank=rank,
                clients=tuple(clients),
                distance=exact.distance(adapter),
                optimum=exact.optimum(rank),
                loss_before=fmean(losses[0, client] for client in clients),
                loss=fmean(losses[number, client] for client in clients),
                stacked=stacked,
            )
        )
    return found


def _round(run: RecordedRun, number: int) -> Path:
    return run.folder / "rounds" / f"{number:04d}"


@dataclass(frozen=True)
class _Exact:
    """delta: module -> dW = sum_k p_k s_k B_k A_k with p_k = w_k / sum of w.
    spectra: module -> its singular values, falling.
    """

    delta: Mapping[str, Tensor]
    spectra: Mapping[str, Tensor]

    @classmethod
    def of(cls, updates: Path, weights: Mapping[str, float]) -> _Exact:
        total = sum(weights.values())
        delta: dict[str, Tensor] = {}
        for client, weight in weights.items():
            for module, update in _updates(Adapter.load(updates / client)).items():
                delta[module] = delta.get(module, 0.0) + weight / total * update
        return cls(delta, {module: torch.linalg.svdvals(value) for module, value in delta.items()})

    def distance(self, adapter: Adapter) -> float:
        update = _updates(adapter)
        return math.hypot(*(float((update[m] - dw).norm()) for m, dw in self.delta.items())) / self.norm

    def optimum(self, rank: int) -> float:
        """By Eckart and Young."""
        return math.hypot(*(float(values[rank:].norm()) for values in self.spectra.values())) / self.norm

    @property
    def norm(self) -> float:
        return math.hypot(*(float(values.norm()) for values in self.spectra.values()))


def _updates(adapter: Adapter) -> dict[str, Tensor]:
    """module -> s B A in float64."""
    found = {}
    for module in adapter.modules:
        a, b = adapter.factors(module)
        found[module] = adapter.scaling(module) * (b.double() @ a.double())
    return found


def received_table(found: Sequence[Received], number: int = 1) -> Table:
    """A section per method, a row per rank."""
    right = ("distance\nfrom dW", "least at\nits rank", "held-out loss\nbefore -> after")
    made = table(
        f"What clients have after round {number} (dW: the exact sum of their updates, by examples)",
        *("method", "to rank", *right),
        right=right,
    )
    made.caption = "Distances of the runs are from what their servers hold: padding's is not dW."
    made.caption_justify = "left"
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
