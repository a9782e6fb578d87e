"""merge: W += dW in place, into base weights of the factors' dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastagg import ops
from fastagg.bench.accuracy import relative_error
from fastagg.bench.baselines.dense import merge_client_by_client, merge_product
from fastagg.bench.cases import Case
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.limits import copy_limit, product_limit
from fastagg.bench.operations.by_module import factor_lists
from fastagg.bench.operations.slabs import slabs_of
from fastagg.bench.workload import Workload

__all__ = ["MERGE"]

Outcome = tuple[Tensor, Tensor]
"""The first module's W before its first run and after it."""

_CONTENDERS = 6  # each has base weights of its own


def _work(workload: Workload) -> Work:
    total = Work()
    for b in workload.buckets:
        moved = (b.rows * (b.m + b.n) + 2.0 * b.m * b.n) * b.dtype.itemsize
        total += Work(bytes=b.modules * moved, flops=2.0 * b.modules * b.m * b.n * b.rows)
    return total


def _bases(workload: Workload) -> list[Tensor]:
    """(L, m, n) of each bucket, of a Llama's size of entries; the first module's row by row."""
    made = []
    for b in workload.buckets:
        base = torch.empty(b.modules, b.m, b.n, dtype=b.dtype, device=b.device)
        base.normal_(0.0, 0.02)
        made.append(base)
    return made


def _prepared(bases: list[Tensor], add: Callable[[], Any]) -> Prepared:
    before = bases[0][0].clone()

    def run() -> Outcome:
        add()
        return before, bases[0][0]

    return Prepared(run)


def _from_clients(workload: Workload) -> Prepared:
    slabs, bases = slabs_of(workload), _bases(workload)

    def add() -> None:
        for base, bucket in zip(bases, slabs, strict=True):
            bucket.fill()
            ops.reconstruct_(base, bucket.A, bucket.Bt, bucket.c)

    return _prepared(bases, add)


def _from_stack(workload: Workload) -> Prepared:
    slabs, bases = slabs_of(workload), _bases(workload)

    def add() -> None:
        for base, bucket in zip(bases, slabs, strict=True):
            ops.reconstruct_(base, bucket.A, bucket.Bt, bucket.c)

    return _prepared(bases, add)


def _baseline(name: str, function: Callable[..., None]) -> Contender:
    def with_function(name: str, function: Callable[..., Any]) -> Contender:
        def prepare(workload: Workload) -> Prepared:
            bases = _bases(workload)
            weights = [base[module] for base in bases for module in range(base.shape[0])]
            calls = [(W, *factors) for W, factors in zip(weights, factor_lists(workload), strict=True)]

            def add() -> None:
                for call in calls:
                    function(*call)

            return _prepared(bases, add)

        return Contender(name, "baseline", prepare, _work)

    compiled = torch.compile(function, dynamic=False)
    plain = with_function(name, function)
    return plain.with_compiled(lambda: with_function(f"torch.compile of {name}", compiled))


def _accuracy(workload: Workload, outcome: Outcome) -> Accuracy:
    """Beyond what rounding the exact sum to W's dtype costs."""
    before, after = outcome
    A, B = workload.by_module()[0].reference()
    rows = slice(0, min(512, B.shape[0]))
    exact = before[rows].double() + B[rows] @ A
    best = relative_error(exact.to(after.dtype), exact)
    return Accuracy(relative_error(after[rows], exact) - best)


def _contenders(workload: Workload) -> list[Contender]:
    return [
        Contender("fastagg stack_, reconstruct_", "fastagg", _from_clients, _work),
        Contender("fastagg reconstruct_, of the stack", "fastagg", _from_stack, _work),
        _baseline("dense accumulate, add", merge_client_by_client),
        _baseline("cat, one product, add", merge_product),
        product_limit(lambda bucket: (bucket.m, bucket.rows, bucket.n)),
        copy_limit(_work),
    ]


def _bytes_per_layer(case: Case, size: int) -> float:
    base = sum(float(p.m * p.n) for p in case.projections) * size
    return case.elements_per_layer * (size + 8.0) + _CONTENDERS * base


MERGE = Operation(
    "merge",
    "W += dW in the factors' dtype",
    "|W - exact| / |exact| beyond the rounding to W's dtype",
    _contenders,
    _accuracy,
    _bytes_per_layer,
)
