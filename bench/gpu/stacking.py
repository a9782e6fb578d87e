"""`stack_` of a bucket beside a copy of its bytes and beside what users write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.adapters import FLORA_RANKS
from bench.gpu.clients import Clients, gaussian
from bench.gpu.timing import Clock, row
from fastagg import ops

Stack = tuple[Tensor, Tensor]
"""A module's A (R, n) and B (m, R)."""


def cat_then_multiply(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Tensor) -> Stack:
    """torch.cat, then one multiply by the rows' coefficients c (R, 1), float32."""
    return torch.cat(list(As)).mul_(c), torch.cat(list(Bs), dim=1)


def client_by_client(As: Sequence[Tensor], Bs: Sequence[Tensor], weights: Sequence[float]) -> Stack:
    """Every client's factor multiplied in float32 and cast, then torch.cat: FLoRA's published form."""
    weighted = [(w * A.float()).to(A.dtype) for A, w in zip(As, weights, strict=True)]
    return torch.cat(weighted), torch.cat(list(Bs), dim=1)


def baselines(clients: Clients) -> dict[str, Callable[[], list[Stack]]]:
    """The whole bucket, module by module; the views of the factors are made beforehand."""
    modules = [clients.factors(module) for module in range(clients.modules)]
    columns = [c.float()[:, None] for c in clients.coefficients]
    return {
        "cat, then multiply": lambda: [
            cat_then_multiply(As, Bs, c) for (As, Bs), c in zip(modules, columns, strict=True)
        ],
        "mul and cast by client, cat": lambda: [
            client_by_client(As, Bs, clients.weights) for As, Bs in modules
        ],
    }


def run(clock: Clock, quick: bool, times: int, copy_rate: float) -> dict[str, Any]:
    """Ten clients of FLoRA's ranks `times` over: R = 160 times."""
    size = 256 if quick else 4096
    modules = 2 if quick else (224 if times == 1 else 32)
    clients = gaussian(FLORA_RANKS * times, modules, size, clock.device)
    A, Bt = (
        torch.empty(modules, clients.rows, size, dtype=torch.bfloat16, device=clock.device)
        for _ in range(2)
    )
    measured = clock.measure(
        {
            "stack_": lambda: ops.stack_(A, Bt, clients.flats, clients.slots, clients.scale),
            "stack_ without scale": lambda: ops.stack_(A, Bt, clients.flats, clients.slots),
            **baselines(clients),
        },
        3 if quick else 15,
    )
    moved = 2.0 * (A.numel() + Bt.numel()) * A.element_size()
    own = measured["stack_"].median
    return {
        "case": f"stack, bf16, {modules} modules of {size} x {size}, R = {clients.rows}",
        "rows": [row(name, time, moved / time.median / 1e12, "TB/s") for name, time in measured.items()],
        "share_of_copy": moved / own / copy_rate,
        "times_faster_than_cat_and_multiply": measured["cat, then multiply"].median / own,
        "times_faster_than_client_by_client": measured["mul and cast by client, cat"].median / own,
    }
