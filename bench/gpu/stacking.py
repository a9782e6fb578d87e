"""`stack_` of a bucket beside a copy of its bytes and beside what users write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.adapters import FLORA_RANKS
from bench.gpu.clients import Clients, gaussian
from bench.gpu.timing import Clock, row
from fastagg import ops


def _cat_then_multiply(clients: Clients) -> list[tuple[Tensor, Tensor]]:
    """torch.cat of each module's factors, then one multiply by the rows' coefficients."""
    out = []
    for module in range(clients.modules):
        As, Bs, _ = clients.factors(module)
        A = torch.cat(As).mul_(clients.coefficients[module, :, None].bfloat16())
        out.append((A, torch.cat(Bs, dim=1)))
    return out


def _client_by_client(clients: Clients) -> list[tuple[Tensor, Tensor]]:
    """mul and cast of every client's factor, then torch.cat: FLoRA's published form."""
    out = []
    for module in range(clients.modules):
        As, Bs, c = clients.factors(module)
        A = torch.cat([(weight * A.float()).bfloat16() for A, weight in zip(As, c, strict=True)])
        out.append((A, torch.cat([B.float().bfloat16() for B in Bs], dim=1)))
    return out


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
            "cat, then multiply": lambda: _cat_then_multiply(clients),
            "mul and cast by client, cat": lambda: _client_by_client(clients),
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
