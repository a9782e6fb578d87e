"""The ops beside a memory copy, torch.mm and the loops they replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.adapters import FLORA_RANKS
from bench.baselines import qr_core_svd, stack_by_loop
from bench.measure import Timing, interleaved
from fastagg import linalg, ops


def stacking(modules: int = 16, size: int = 4096, repetitions: int = 15) -> dict[str, Any]:
    """`stack` of a bucket, bf16 to fp32, beside copies of its result: into memory that is there, and
    into fresh memory, where page faults set the rate."""
    ranks = FLORA_RANKS
    rows = sum(ranks)
    flats, slots = _clients(ranks, modules, size)
    views = _views(flats, ranks, modules, size)
    scale = torch.full((len(slots),), 0.1, dtype=torch.float64)
    A = torch.empty(modules, rows, size)
    Bt = torch.empty(modules, rows, size)
    source = torch.randn(2, modules, rows, size)
    target = torch.empty_like(source)
    shape = {"modules": modules, "rows": rows, "m": size, "n": size, "dtype": torch.float32}
    times = interleaved(
        {
            "stack_ (slabs reused)": lambda: ops.stack_(A, Bt, flats, slots, scale),
            "stack (fresh slabs)": lambda: ops.stack(flats, slots, scale, **shape),
            "cat and mul": lambda: [stack_by_loop(As, Bs, [0.1] * len(As)) for As, Bs in views],
            "copy_ (memory reused)": lambda: target.copy_(source),
            "clone (fresh memory)": lambda: source.clone(),
        },
        repetitions,
    )
    count = modules * rows * size * 2
    moved = {name: count * (8 if "memory" in name else 6) for name in times}
    rates = {name: moved[name] / times[name].median / 1e9 for name in times}
    return {
        "case": "stack, bf16 to fp32",
        "rows": [_row(name, time, rates[name], "GB/s") for name, time in times.items()],
        "share_of_copy": rates["stack_ (slabs reused)"] / rates["copy_ (memory reused)"],
        "share_of_fresh_copy": times["clone (fresh memory)"].median
        / times["stack (fresh slabs)"].median,
        "times_faster_than_loop": times["cat and mul"].median
        / times["stack_ (slabs reused)"].median,
        "times_faster_than_loop_with_fresh_slabs": times["cat and mul"].median
        / times["stack (fresh slabs)"].median,
    }


def reconstruction(size: int = 4096, rows: int = 160, repetitions: int = 9) -> dict[str, Any]:
    """`reconstruct` beside torch.mm of the same fp32 factors, and the in-place forms."""
    A, Bt = torch.randn(1, rows, size), torch.randn(1, rows, size)
    B = Bt[0].mT.contiguous()
    W = torch.zeros(1, size, size)
    W16 = W.bfloat16()
    c = torch.rand(1, rows, dtype=torch.float64)
    times = interleaved(
        {
            "reconstruct": lambda: ops.reconstruct(A, Bt, c),
            "torch.mm": lambda: torch.mm(B, A[0]),
            "reconstruct_ fp32": lambda: ops.reconstruct_(W, A, Bt, c),
            "torch.addmm_ fp32": lambda: W[0].addmm_(B, A[0]),
            "reconstruct_ bf16 base": lambda: ops.reconstruct_(W16, A, Bt, c),
            "mm, then add to bf16 base": lambda: W16[0].add_(torch.mm(B, A[0])),
        },
        repetitions,
    )
    flops = 2.0 * size * size * rows
    return {
        "case": f"reconstruct {size} x {size}, R = {rows}",
        "rows": [_row(name, time, flops / time.median / 1e9, "GFLOP/s") for name, time in times.items()],
        "share_of_mm": times["torch.mm"].median / times["reconstruct"].median,
    }


def decomposition(size: int = 4096, modules: int = 8, repetitions: int = 5) -> dict[str, Any]:
    """Each route on a bucket of ten clients (R = 160), milliseconds a module."""
    A = torch.randn(modules, 160, size)
    Bt = torch.randn(modules, 160, size)
    c = torch.rand(modules, 160, dtype=torch.float64)

    def strong() -> list[tuple[Tensor, Tensor]]:
        return [
            qr_core_svd([A[l]], [Bt[l].mT * c[l].float()], [1.0], 64) for l in range(modules)  # noqa: E741
        ]

    times = interleaved(
        {
            "gram": lambda: linalg.svd_of_stack(A, Bt, c, 64, route="gram"),
            "randomized": lambda: linalg.svd_of_stack(A, Bt, c, 64, route="randomized"),
            "cat + 2 QR + core SVD": strong,
        },
        repetitions,
    )
    return {
        "case": f"truncated SVD, {modules} modules of {size} x {size}, R = 160, r = 64",
        "rows": [
            _row(name, time, 1e3 * time.median / modules, "ms a module")
            for name, time in times.items()
        ],
        "gram_times_faster_than_strong": times["cat + 2 QR + core SVD"].median
        / times["gram"].median,
    }


def _row(name: str, time: Timing, rate: float, unit: str) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": time.median,
        "quartiles": [time.low, time.high],
        "repetitions": time.repetitions,
        "rate": rate,
        "unit": unit,
    }


def _clients(
    ranks: tuple[int, ...], modules: int, size: int
) -> tuple[list[Tensor], Tensor]:
    """Flat bf16 buffers, A then B for each module, and the slots that stack them."""
    flats, slots, row = [], [], 0
    for k, rank in enumerate(ranks):
        flats.append(torch.randn(modules * rank * 2 * size).bfloat16())
        for module in range(modules):
            offset = module * rank * 2 * size * 2
            slots.append([module, row, rank, k, offset, 1, k, offset + rank * size * 2, 1])
        row += rank
    return flats, torch.tensor(sorted(slots))


def _views(
    flats: list[Tensor], ranks: tuple[int, ...], modules: int, size: int
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The same factors as tensors, module by module."""
    views = []
    for module in range(modules):
        As, Bs = [], []
        for flat, rank in zip(flats, ranks, strict=True):
            a, b = flat.view(modules, 2, rank * size)[module]
            As.append(a.view(rank, size))
            Bs.append(b.view(size, rank))
        views.append((As, Bs))
    return views


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [record["case"]]
    width = max(28, *(len(row["name"]) for row in record["rows"]))
    for row in record["rows"]:
        lines.append(
            f"  {row['name']:{width}s}{1e3 * row['seconds']:10.2f} ms{row['rate']:10.1f} {row['unit']}"
        )
    for key, value in record.items():
        if isinstance(value, float):
            lines.append(f"  {key.replace('_', ' ')}: {value:.3g}")
    return "\n".join(lines)
