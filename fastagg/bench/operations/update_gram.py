"""update_gram: inner products <dW_i, dW_j> of the clients' true updates, for robust and fair weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastagg import ops
from fastagg.bench.accuracy import relative_error
from fastagg.bench.baselines.gram import (
    dense_inner_products,
    factored_inner_products,
    pairwise_traces,
)
from fastagg.bench.cases import Case
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.limits import copy_limit, product_limit, wide_product_limit
from fastagg.bench.operations.by_module import baseline
from fastagg.bench.operations.slabs import slabs_of
from fastagg.bench.workload import Workload

__all__ = ["UPDATE_GRAM"]


def _work(workload: Workload) -> Work:
    """Half of two Gram matrices in float64."""
    total = Work()
    for b in workload.buckets:
        length = b.m + b.n
        clients = len(b.ranks)
        total += Work(
            bytes=b.modules * (b.rows * length * b.dtype.itemsize + 8.0 * clients**2),
            wide_flops=float(b.modules) * b.rows**2 * length,
        )
    return total


def _factored_work(workload: Workload) -> Work:
    """Both Gram matrices whole, in float32."""
    work = _work(workload)
    return Work(bytes=work.bytes, flops=2 * work.wide_flops)


def _pairwise_work(workload: Workload) -> Work:
    """Of each pair of clients once: half of both Gram matrices, in float32."""
    work = _work(workload)
    return Work(bytes=work.bytes, flops=work.wide_flops)


def _dense_work(workload: Workload) -> Work:
    total = Work()
    for b in workload.buckets:
        clients = len(b.ranks)
        flops = 2.0 * b.m * b.n * (b.rows + clients**2)
        total += Work(bytes=b.modules * 4.0 * clients * b.m * b.n, flops=b.modules * flops)
    return total


def _dense_memory(workload: Workload) -> float:
    bucket = workload.buckets[0]
    return 8.0 * len(bucket.ranks) * bucket.m * bucket.n


def _own(workload: Workload) -> Prepared:
    slabs = [(s, s.bucket.owners, len(s.bucket.ranks)) for s in slabs_of(workload)]

    def run() -> list[Tensor]:
        found = []
        for s, owners, clients in slabs:
            s.fill()
            found.append(ops.update_gram(s.A, s.Bt, s.c, owners, clients=clients))
        return found

    return Prepared(run)


def _accuracy(workload: Workload, found: Tensor) -> Accuracy:
    module = workload.by_module()[0]
    A, B = module.reference()
    product = (B.mT @ B) * (A @ A.mT)
    owners = torch.arange(len(module.As)).repeat_interleave(
        torch.tensor([a.shape[0] for a in module.As])
    )
    chosen = torch.nn.functional.one_hot(owners, len(module.As)).to(product)
    return Accuracy(relative_error(found, chosen.mT @ product @ chosen))


def _contenders(workload: Workload) -> list[Contender]:
    return [
        Contender("fastagg update_gram", "fastagg", _own, _work, outcome=lambda found: found[0][0]),
        baseline("cat, 2 products, block sums", factored_inner_products, _factored_work),
        baseline("traces, pair by pair", pairwise_traces, _pairwise_work),
        baseline("dense updates, flattened", dense_inner_products, _dense_work, memory=_dense_memory),
        product_limit(lambda b: (b.rows, b.n, b.rows)),
        wide_product_limit(lambda b: (b.rows, b.n, b.rows)),
        copy_limit(_work),
    ]


def _bytes_per_layer(case: Case, size: int) -> float:
    return case.elements_per_layer * (size + 4.0) * 3


UPDATE_GRAM = Operation(
    "update_gram",
    "inner products of the clients' updates",
    "|found - exact| / |exact|",
    _contenders,
    _accuracy,
    _bytes_per_layer,
)
