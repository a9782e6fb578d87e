"""merge: W += dW in place, into base weights of the factors' dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastagg import ops
from fastagg.bench.accuracy import relative_error
from fastagg.bench.baselines.dense import merge_client_by_client, merge_product
from fastagg.bench.cases import Case
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.limits import copy_limit, product_limit
from fastagg.bench.operations.by_module import baseline, factor_lists
from fastagg.bench.operations.slabs import slabs_of
from fastagg.bench.workload import Workload

__all__ = ["MERGE", "first_base"]

_CONTENDERS = 6  # each has base weights of its own


def _work(workload: Workload) -> Work:
    total = Work()
    for b in workload.buckets:
        moved = (b.rows * (b.m + b.n) + 2.0 * b.m * b.n) * b.dtype.itemsize
        total += Work(bytes=b.modules * moved, flops=2.0 * b.modules * b.m * b.n * b.rows)
    return total


def first_base(workload: Workload) -> Tensor:
    """The first module's W before anything is added."""
    bucket = workload.buckets[0]
    return _base(torch.empty(bucket.m, bucket.n, dtype=bucket.dtype, device=bucket.device), 0)


def _base(W: Tensor, module: int) -> Tensor:
    """Entries of a Llama's size, of a stream of the module's own: the first alone can be drawn again."""
    return W.normal_(0.0, 0.02, generator=torch.Generator(W.device).manual_seed(module))


def _bases(workload: Workload) -> list[Tensor]:
    """(L, m, n) of each bucket."""
    made = []
    for b in workload.buckets:
        made.append(torch.empty(b.modules, b.m, b.n, dtype=b.dtype, device=b.device))
        for module, W in enumerate(made[-1]):
            _base(W, module)
    return made


def _from_clients(workload: Workload) -> Prepared:
    slabs, bases = slabs_of(workload), _bases(workload)

    def run() -> list[Tensor]:
        for W, bucket in zip(bases, slabs, strict=True):
            bucket.fill()
            ops.reconstruct_(W, bucket.A, bucket.Bt, bucket.c)
        return bases

    return Prepared(run)


def _from_stack(workload: Workload) -> Prepared:
    slabs, bases = slabs_of(workload), _bases(workload)

    def run() -> list[Tensor]:
        for W, bucket in zip(bases, slabs, strict=True):
            ops.reconstruct_(W, bucket.A, bucket.Bt, bucket.c)
        return bases

    return Prepared(run)


def _first_of_bucket(bases: list[Tensor]) -> Tensor:
    return bases[0][0]


def _arguments(workload: Workload) -> list[tuple[Any, ...]]:
    """Every module's (W, As, Bs, c), W its own."""
    weights = [W for base in _bases(workload) for W in base]
    return [(W, *lists) for W, lists in zip(weights, factor_lists(workload), strict=True)]


def _accuracy(workload: Workload, after: Tensor) -> Accuracy:
    """Beyond what rounding the exact sum to W's dtype costs; of a first run."""
    A, B = workload.by_module()[0].reference()
    rows = slice(0, min(512, B.shape[0]))
    exact = first_base(workload)[rows].double() + B[rows] @ A
    best = relative_error(exact.to(after.dtype), exact)
    return Accuracy(relative_error(after[rows], exact) - best)


def _contenders(workload: Workload) -> list[Contender]:
    return [
        Contender("fastagg stack_, reconstruct_", "fastagg", _from_clients, _work, _first_of_bucket),
        Contender("fastagg reconstruct_, of the stack", "fastagg", _from_stack, _work, _first_of_bucket),
        baseline("dense accumulate, add", merge_client_by_client, _work, arguments=_arguments),
        baseline("cat, one product, add", merge_product, _work, arguments=_arguments),
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
