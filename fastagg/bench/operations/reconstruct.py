"""reconstruct: dense dW (m, n) in float32 of every module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastagg import ops
from fastagg.bench.accuracy import relative_error
from fastagg.bench.baselines.dense import cat_then_product, dense_accumulate
from fastagg.bench.cases import Case
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.limits import copy_limit
from fastagg.bench.operations.by_module import baseline
from fastagg.bench.operations.slabs import slabs_of
from fastagg.bench.workload import Workload

__all__ = ["RECONSTRUCT"]


def _work(workload: Workload) -> Work:
    total = Work()
    for b in workload.buckets:
        moved = b.rows * (b.m + b.n) * b.dtype.itemsize + 4.0 * b.m * b.n
        total += Work(bytes=b.modules * moved, flops=2.0 * b.modules * b.m * b.n * b.rows)
    return total


def _from_clients(workload: Workload) -> Prepared:
    slabs = slabs_of(workload)

    def run() -> list[Tensor]:
        found = []
        for bucket in slabs:
            bucket.fill()
            found.append(ops.reconstruct(bucket.A, bucket.Bt, bucket.c))
        return found

    return Prepared(run)


def _from_stack(workload: Workload) -> Prepared:
    """The op alone, of float32 slabs that hold the coefficients already: what torch.mm is given."""
    slabs = [(s.A.float() * s.c[..., None].float(), s.Bt.float()) for s in slabs_of(workload)]
    return Prepared(lambda: [ops.reconstruct(A, Bt) for A, Bt in slabs])


def _library(workload: Workload) -> Prepared:
    """torch.mm of the same float32 matrices, module by module, into fresh memory as the op's."""
    pairs = []
    for s in slabs_of(workload):
        weighted = s.A.float() * s.c[..., None].float()
        pairs += [(Bt.mT.contiguous(), A) for A, Bt in zip(weighted, s.Bt.float(), strict=True)]
    return Prepared(lambda: [torch.mm(B, A) for B, A in pairs])


def _first_of_bucket(found: Any) -> Tensor:
    return found[0][0]  # type: ignore[no-any-return]


def _accuracy(workload: Workload, W: Tensor) -> Accuracy:
    A, B = workload.by_module()[0].reference()
    rows = slice(0, min(512, B.shape[0]))
    return Accuracy(relative_error(W[rows], B[rows] @ A))


def _contenders(workload: Workload) -> list[Contender]:
    return [
        Contender("fastagg stack_, reconstruct", "fastagg", _from_clients, _work, _first_of_bucket),
        Contender("fastagg reconstruct, of the stack", "fastagg", _from_stack, _work, _first_of_bucket),
        baseline("dense accumulate", dense_accumulate, _work),
        baseline("cat, one product", cat_then_product, _work),
        Contender("torch.mm, of the stack", "limit", _library, lambda w: Work(flops=_work(w).flops)),
        copy_limit(_work),
    ]


def _bytes_per_layer(case: Case, size: int) -> float:
    results = sum(4.0 * p.m * p.n for p in case.projections)
    return case.elements_per_layer * (size + 12.0) + 2 * results


RECONSTRUCT = Operation(
    "reconstruct", "dense dW in float32", "|W - dW| / |dW|", _contenders, _accuracy, _bytes_per_layer
)
