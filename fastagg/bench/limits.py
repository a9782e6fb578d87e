"""What the machine can do at most, measured beside what is to reach it: a copy and matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastagg.bench.clock import Clock
from fastagg.bench.contender import Contender, Prepared, Work
from fastagg.bench.workload import Bucket, Workload

__all__ = ["MEMORY_COPY", "copy_limit", "product_limit", "product_rate", "wide_product_limit"]

MEMORY_COPY = "memory copy"
"""How rows of a record name that limit."""

Shape = Callable[[Bucket], tuple[int, int, int]]
"""A bucket -> (i, k, j) of one module's product of (i, k) and (k, j)."""


def copy_limit(work: Callable[[Workload], Work]) -> Contender:
    """`copy_` of as many bytes as the operation moves, half read and half written; memory is there."""

    def prepare(workload: Workload) -> Prepared:
        count = max(1, int(work(workload).bytes) // 8)
        source = torch.rand(count, device=workload.device)
        target = torch.zeros_like(source)
        return Prepared(lambda: target.copy_(source))

    return Contender(MEMORY_COPY, "limit", prepare, lambda w: Work(bytes=work(w).bytes))


def product_limit(shape: Shape) -> Contender:
    """`torch.mm` of this shape, of a module, into memory that is there: float32 on a CPU, on a GPU the
    factors' dtype, which its tensor cores take."""

    def prepare(workload: Workload) -> Prepared:
        dtype = workload.dtype if workload.device.type == "cuda" else torch.float32
        return _product(workload, shape, dtype)

    return Contender(
        "matrix product", "limit", prepare, lambda w: Work(flops=_flops(w, shape)), one_module=True
    )


def wide_product_limit(shape: Shape) -> Contender:
    """The same in float64."""
    return Contender(
        "float64 product",
        "limit",
        lambda workload: _product(workload, shape, torch.float64),
        lambda w: Work(wide_flops=_flops(w, shape)),
        one_module=True,
    )


def product_rate(clock: Clock) -> float:
    """Flops a second of a float32 product, roughly: to tell beforehand what would take too long."""
    size = 1024
    x, y = (torch.randn(size, size, device=clock.device) for _ in range(2))
    seconds = (clock.once(lambda: torch.mm(x, y))[0] for _ in range(3))
    return 2.0 * size**3 / min(seconds)


def _flops(workload: Workload, shape: Shape) -> float:
    total = 0.0
    for bucket in workload.buckets:
        i, k, j = shape(bucket)
        total += 2.0 * bucket.modules * i * k * j
    return total


def _product(workload: Workload, shape: Shape, dtype: torch.dtype) -> Prepared:
    i, k, j = shape(workload.buckets[0])
    x = torch.randn(i, k, device=workload.device).to(dtype)
    y = torch.randn(k, j, device=workload.device).to(dtype)
    out = torch.empty(i, j, dtype=dtype, device=workload.device)
    return Prepared(lambda: torch.mm(x, y, out=out))
