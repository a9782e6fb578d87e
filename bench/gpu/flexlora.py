"""FlexLoRA's server step for a whole model: from the clients' factors to each client's next factors,
all on the device, beside what is done today on the same GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import excess_error
from bench.adapters import FLORA_RANKS
from bench.baselines import dense_svd, qr_core_svd
from bench.gpu.clients import Clients, gaussian
from bench.gpu.timing import Clock, captured, row, scaled
from fastagg import ops

RANK = 64  # the largest client's
OVERSAMPLING = 64

Decompose = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def exact(A: Tensor, Bt: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The exact route."""
    return ops.gram_svd(A, Bt, c, rank=RANK)


def randomized(A: Tensor, Bt: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The randomized route, l = 2r, two power iterations."""
    return ops.randomized_svd(A, Bt, c, rank=RANK, oversampling=OVERSAMPLING)


@dataclass
class Step:
    """One server step with its memory: what an aggregator keeps from round to round."""

    clients: Clients
    decompose: Decompose

    def __post_init__(self) -> None:
        clients = self.clients
        shape = (clients.modules, clients.rows, clients.size)
        device = clients.flats[0].device
        self.A, self.Bt = (torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.slots, self.scalings, sizes = clients.handout()
        self.next = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]

    def stack(self) -> None:
        ops.stack_(self.A, self.Bt, self.clients.flats, self.clients.slots)

    def svd(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.decompose(self.A, self.Bt, self.clients.coefficients)

    def redistribute(self, U: Tensor, S: Tensor, Vt: Tensor) -> None:
        ops.redistribute_(self.next, U, S, Vt, self.slots, self.scalings)

    def all(self) -> Tensor:
        self.stack()
        U, S, Vt, stats = self.svd()
        self.redistribute(U, S, Vt)
        return stats


def run(clock: Clock, quick: bool, times: int, decompose: Decompose, baselines: bool) -> dict[str, Any]:
    """All 224 linear modules of a 7B model at 4096 x 4096, R = 160 times."""
    size, modules = (256, 2) if quick else (4096, 224)
    clients = gaussian(FLORA_RANKS * times, modules, size, clock.device)
    step = Step(clients, decompose)
    record: dict[str, Any] = {
        "case": f"FlexLoRA, {decompose.__name__}, {modules} x {size} x {size}, R = {clients.rows}"
    }
    if clock.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step.all()
        record["peak_bytes_beside_clients_and_slabs"] = torch.cuda.max_memory_allocated() - held
    step.stack()
    U, S, Vt, stats = step.svd()
    parts: dict[str, Callable[[], object]] = {
        "whole step": step.all,
        "stack_": step.stack,
        decompose.__name__: step.svd,
        "redistribute_": lambda: step.redistribute(U, S, Vt),
    }
    if clock.device.type == "cuda":
        parts["whole step, as a CUDA graph"] = captured(step.all)
    measured = clock.measure(parts, 3 if quick else 10)
    rows = [
        row(name, time, 1e6 * time.median / modules, "us a module") for name, time in measured.items()
    ]
    record["rows"] = rows
    if baselines:
        record |= _beside_baselines(clock, quick, clients, measured["whole step"].median, rows)
    record |= _accuracy(clients, U, S, Vt, stats)
    return record


def _beside_baselines(
    clock: Clock, quick: bool, clients: Clients, own: float, rows: list[dict[str, Any]]
) -> dict[str, float]:
    """Baselines on as many modules as they can finish, scaled to all."""
    ratios = {}
    for name, baseline, count in (
        ("cat + 2 QR + core SVD", qr_core_svd, 2 if quick else 8),
        ("dense + linalg.svd", dense_svd, 1 if quick else 2),
    ):

        some = [clients.factors(module) for module in range(count)]

        def loop(baseline: Any = baseline, some: Any = some) -> None:
            for As, Bs in some:
                baseline(As, Bs, clients.weights, RANK)

        time = clock.measure({name: loop}, 1 if "dense" in name else 3)[name]
        whole = scaled(time, clients.modules / count)
        rows.append(
            row(
                f"{name} ({count} modules, scaled)",
                whole,
                1e3 * whole.median / clients.modules,
                "ms a module",
            )
        )
        ratios[f"times_faster_than_{name.replace(' + ', '_').replace(' ', '_')}"] = whole.median / own
    return ratios


def _accuracy(clients: Clients, U: Tensor, S: Tensor, Vt: Tensor, stats: Tensor) -> dict[str, float]:
    worst, loss = 0.0, 0.0
    for module in (0, clients.modules - 1):
        As, Bs = clients.factors(module)
        left = U[module] * S[module]
        worst = max(worst, excess_error(As, Bs, clients.weights, left, Vt[module]))
        for vectors in (U[module].mT.double(), Vt[module].double()):
            error = vectors @ vectors.mT - torch.eye(RANK, device=S.device)
            loss = max(loss, float(error.abs().max()))
    certified = stats[:, 1].clamp(min=0).sqrt() / stats[:, 0].sqrt()
    return {
        "excess_error": worst,
        "loss_of_orthogonality": loss,
        "largest_certificate": float(certified.max()),
    }
