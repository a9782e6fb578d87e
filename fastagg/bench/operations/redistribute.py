"""redistribute: from U, S, Vt of every module to every client's next factors, in its dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastagg import linalg, ops
from fastagg.bench.accuracy import relative_error
from fastagg.bench.baselines.handing_out import slice_by_client, slice_by_rank
from fastagg.bench.cases import Case
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.limits import copy_limit
from fastagg.bench.operations.by_module import baseline
from fastagg.bench.operations.svd import rank_of
from fastagg.bench.workload import SCALING, Bucket, Workload
from fastagg.dtypes import DTYPE_CODES

__all__ = ["REDISTRIBUTE", "Outlet", "outlet_of"]

Outcome = tuple[Tensor, Tensor]
"""The first client's A (r, n) and B (m, r) of the first module."""


@dataclass(frozen=True)
class Outlet:
    """`redistribute`'s table, scalings and sizes of a bucket: every client's own rank and dtype."""

    slots: Tensor
    scalings: Tensor
    sizes: list[int]


def outlet_of(bucket: Bucket) -> Outlet:
    """In the layout in which the clients' factors came."""
    code, size = DTYPE_CODES[bucket.dtype], bucket.dtype.itemsize
    table = []
    for k, rank in enumerate(bucket.ranks):
        for module in range(bucket.modules):
            a = module * rank * (bucket.m + bucket.n) * size
            table.append([module, rank, k, a, code, a + rank * bucket.n * size, code])
    slots = torch.tensor(table, dtype=torch.int64).to(bucket.device)
    scalings = torch.full((len(table),), SCALING, dtype=torch.float64, device=bucket.device)
    return Outlet(slots, scalings, [flat.nbytes for flat in bucket.flats])


Decomposed = tuple[Tensor, Tensor, Tensor]


def _decomposed(workload: Workload) -> list[Decomposed]:
    """Orthonormal vectors and falling singular values of the right shapes: the op does not ask whose."""
    made = []
    for bucket in workload.buckets:
        rank = rank_of(workload, bucket)
        A, Bt = bucket.first(1).stack()
        one = linalg.svd_of_stack(A, Bt, None, rank)
        parts = (one.U, one.S, one.Vt)
        U, S, Vt = (x.expand(bucket.modules, *x.shape[1:]).contiguous() for x in parts)
        made.append((U, S, Vt))
    return made


def _work(workload: Workload) -> Work:
    total = 0.0
    for b in workload.buckets:
        read = 4.0 * rank_of(workload, b) * (b.m + b.n)
        total += b.modules * (read + b.rows * (b.m + b.n) * b.dtype.itemsize)
    return Work(bytes=total)


def _fresh(workload: Workload) -> Prepared:
    calls = [
        (parts, bucket, outlet_of(bucket))
        for parts, bucket in zip(_decomposed(workload), workload.buckets, strict=True)
    ]

    def run() -> Outcome:
        flats = [
            ops.redistribute(*parts, outlet.slots, outlet.scalings, sizes=outlet.sizes)
            for parts, _, outlet in calls
        ]
        return _outcome(calls[0][1], flats[0])

    return Prepared(run)


def _in_place(workload: Workload) -> Prepared:
    """Into buffers that are there."""
    calls = []
    for parts, bucket in zip(_decomposed(workload), workload.buckets, strict=True):
        flats = [torch.zeros(f.nbytes, dtype=torch.uint8, device=f.device) for f in bucket.flats]
        calls.append((flats, parts, bucket, outlet_of(bucket)))

    def run() -> Outcome:
        for flats, parts, _, outlet in calls:
            ops.redistribute_(flats, *parts, outlet.slots, outlet.scalings)
        return _outcome(calls[0][2], calls[0][0])

    return Prepared(run)


def _outcome(bucket: Bucket, flats: list[Tensor]) -> Outcome:
    """Views alone: they cost nothing beside the run."""
    rank = bucket.ranks[0]
    flat = flats[0].view(bucket.dtype).view(bucket.modules, -1)[0]
    a, b = flat[: rank * bucket.n], flat[rank * bucket.n :]
    return a.view(rank, bucket.n), b.view(bucket.m, rank)


def _arguments(workload: Workload) -> list[tuple[Any, ...]]:
    calls = []
    for (U, S, Vt), bucket in zip(_decomposed(workload), workload.buckets, strict=True):
        for module in range(bucket.modules):
            calls.append((U[module], S[module], Vt[module], bucket.ranks, SCALING, bucket.dtype))
    return calls


def _accuracy(workload: Workload, outcome: Outcome) -> Accuracy:
    """Of the first client's s B A beside U S Vt truncated to its rank."""
    U, S, Vt = (part[0] for part in _decomposed(workload)[0])
    A, B = outcome
    rows = slice(0, min(512, U.shape[0]))
    rank = A.shape[0]
    exact = (U[rows, :rank].double() * S[:rank].double()) @ Vt[:rank].double()
    return Accuracy(relative_error(SCALING * B[rows].double() @ A.double(), exact))


def _contenders(workload: Workload) -> list[Contender]:
    return [
        Contender("fastagg redistribute_", "fastagg", _in_place, _work),
        Contender("fastagg redistribute, fresh memory", "fastagg", _fresh, _work),
        *(
            baseline(name, function, _work, arguments=_arguments, outcome=lambda clients: clients[0])
            for name, function in (
                ("slice and cast by client", slice_by_client),
                ("cast, slice by rank, copy", slice_by_rank),
            )
        ),
        copy_limit(_work),
    ]


def _bytes_per_layer(case: Case, size: int) -> float:
    decomposed = sum(4.0 * case.rank * (p.m + p.n) for p in case.projections)
    return case.elements_per_layer * size * 6 + 4 * decomposed


REDISTRIBUTE = Operation(
    "redistribute",
    "every client's next factors",
    "|s B A - U S Vt| / |U S Vt| of the first client: the rounding to its dtype",
    _contenders,
    _accuracy,
    _bytes_per_layer,
)
