"""The decompositions' memory beside what a round's plan counts for them: max_memory is obeyed by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from on_device import moved, namespace, on_gpu
from stacks import product, random_stack
from torch.profiler import ProfilerActivity, profile

from fastagg.handouts.choices import Settings, TruncatedSVD

ROUNDING = 1 << 16
"""What the allocator adds to some dozens of pieces."""


def bytes_of(call: Callable[[], object]) -> int:
    """What a call allocates: its peak on a GPU; all of it on the shim, where nothing is given back."""
    if on_gpu():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        held = call()
        torch.cuda.synchronize()
        del held
        return torch.cuda.max_memory_allocated() - before
    torch.use_deterministic_algorithms(False)  # filling is another op's time, and no memory
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        held = call()
    del held
    events = profiled.key_averages()
    return sum(event.self_cpu_memory_usage for event in events if event.key == "aten::empty")


@pytest.mark.parametrize("route", ["gram", "randomized", "dense"])
@pytest.mark.parametrize(
    ("modules", "m", "n", "rows", "rank"),
    [(1, 200, 150, 32, 8), (3, 200, 150, 32, 8), (1, 90, 260, 70, 12), (1, 90, 100, 16, 40)],
)
def test_a_decomposition_takes_what_the_plan_counts(
    modules: int, m: int, n: int, rows: int, rank: int, route: str, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, modules, rows, m, n, torch.bfloat16)
    c = torch.rand(modules, rows, generator=rng, dtype=torch.float64)
    W = product(A, Bt, c).float()
    if on_gpu():
        A, Bt, c, W = moved([A, Bt, c, W])
    ops = namespace()
    taken = bytes_of(
        {
            "gram": lambda: ops.gram_svd(A, Bt, c, rank),
            "randomized": lambda: ops.randomized_svd(A, Bt, c, rank, rank, 2, 0, None),
            "dense": lambda: ops.randomized_svd_dense(W, rank, rank, 2, 0, None),
        }[route]
    )
    settings = Settings(route, device=torch.device("cuda"))
    counted = TruncatedSVD().work_bytes(m, n, 0 if route == "dense" else rows, rank, settings)
    result = modules * 4 * rank * (m + n + 1)
    assert result < taken <= modules * counted + ROUNDING
