"""Baselines go module by module over lists of tensors, with and without torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from fastagg.bench.contender import Contender, Prepared, Work, as_it_is
from fastagg.bench.workload import Workload

__all__ = ["baseline", "factor_lists"]


def factor_lists(workload: Workload) -> list[tuple[Any, ...]]:
    """Every module's (As, Bs, c)."""
    return [(module.As, module.Bs, module.c) for module in workload.by_module()]


def baseline(
    name: str,
    function: Callable[..., Any],
    work: Callable[[Workload], Work],
    *,
    arguments: Callable[[Workload], list[tuple[Any, ...]]] = factor_lists,
    memory: Callable[[Workload], float] = lambda workload: 0.0,
    outcome: Callable[[Any], Any] = as_it_is,
) -> Contender:
    """`function` of each module's arguments; the lists of views are made beforehand. `outcome` is of
    one module's result."""

    def contender(name: str, make: Callable[[], Callable[..., Any]]) -> Contender:
        def prepare(workload: Workload) -> Prepared:
            made, calls = make(), arguments(workload)
            return Prepared(lambda: [made(*call) for call in calls])

        return Contender(
            name,
            "baseline",
            prepare,
            work,
            outcome=lambda results: outcome(results[0]),
            memory=memory,
        )

    @cache
    def compiled() -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    plain = contender(name, lambda: function)
    return plain.with_compiled(lambda: contender(f"torch.compile of {name}", compiled))
