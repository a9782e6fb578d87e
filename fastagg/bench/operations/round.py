"""round: FlexLoRA's server step in memory, from the clients' factors to every client's next factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastagg import linalg, ops
from fastagg.bench.accuracy import of_approximation
from fastagg.bench.baselines.decomposition import dense_svd, dense_svd_lowrank, qr_core_svd
from fastagg.bench.baselines.handing_out import Handouts, slice_by_rank
from fastagg.bench.cases import Case
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.limits import copy_limit, product_limit, wide_product_limit
from fastagg.bench.operations.by_module import baseline, factor_lists
from fastagg.bench.operations.redistribute import outlet_of
from fastagg.bench.operations.slabs import slabs_of
from fastagg.bench.operations.svd import (
    dense_lowrank_work,
    dense_svd_work,
    exact_work,
    qr_core_work,
    rank_of,
    route_work,
)
from fastagg.bench.workload import SCALING, Workload

__all__ = ["ROUND", "in_memory"]

Outcome = tuple[Tensor, Tensor]
"""The first client's next A (r, n) and B (m, r) of the first module."""


def in_memory(workload: Workload) -> Callable[[], Outcome]:
    """stack_, the SVD by the route that `auto` takes, redistribute_; memory is kept from run to run."""
    slabs = slabs_of(workload)
    outlets = [outlet_of(s.bucket) for s in slabs]
    handed = [
        [torch.zeros(size, dtype=torch.uint8, device=workload.device) for size in outlet.sizes]
        for outlet in outlets
    ]

    def run() -> Outcome:
        for s, outlet, flats in zip(slabs, outlets, handed, strict=True):
            s.fill()
            found = linalg.svd_of_stack(s.A, s.Bt, s.c, rank_of(workload, s.bucket))
            ops.redistribute_(flats, found.U, found.S, found.Vt, outlet.slots, outlet.scalings)
        bucket = slabs[0].bucket
        rank = bucket.ranks[0]
        first = handed[0][0].view(bucket.dtype).view(bucket.modules, -1)[0]
        split = rank * bucket.n
        return first[:split].view(rank, bucket.n), first[split:].view(bucket.m, rank)

    return run


def _captured(workload: Workload) -> Prepared:
    """The same as one CUDA graph: no launch costs the host anything."""
    run = in_memory(workload)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = run()

    def replay() -> Outcome:
        graph.replay()
        return outcome

    return Prepared(replay)


def _baseline(
    name: str, decompose: Callable[..., Any], work: Callable[[Workload], Work]
) -> Contender:
    def step(As: Any, Bs: Any, c: Any, rank: int, ranks: Any, dtype: torch.dtype) -> Handouts:
        left, right = decompose(As, Bs, c, rank)
        return slice_by_rank(left, left.new_ones(left.shape[1]), right, ranks, SCALING, dtype)

    def arguments(workload: Workload) -> list[tuple[Any, ...]]:
        more = [
            (rank_of(workload, b), b.ranks, b.dtype) for b in workload.buckets for _ in range(b.modules)
        ]
        return [(*lists, *each) for lists, each in zip(factor_lists(workload), more, strict=True)]

    return baseline(name, step, work, arguments=arguments, outcome=lambda clients: clients[0])


def _accuracy(workload: Workload, outcome: Outcome) -> Accuracy:
    """Of what the first client is handed, which rounding to its dtype is part of."""
    A, B = outcome
    module = workload.by_module()[0]
    return Accuracy(of_approximation(module, SCALING * B.double(), A.double()).error)


def _contenders(workload: Workload) -> list[Contender]:
    on_gpu = workload.device.type == "cuda"
    captured = Contender("fastagg, a CUDA graph", "fastagg", _captured, lambda w: route_work(w, "auto"))
    return [
        Contender(
            "fastagg", "fastagg", lambda w: Prepared(in_memory(w)), lambda w: route_work(w, "auto")
        ),
        *([captured] if on_gpu else []),
        _baseline("cat + 2 QR + core SVD", qr_core_svd, qr_core_work),
        _baseline("dense + svd_lowrank", dense_svd_lowrank, dense_lowrank_work),
        _baseline("dense + linalg.svd", dense_svd, dense_svd_work),
        product_limit(lambda b: (b.m, b.rows, 2 * max(b.ranks))),
        wide_product_limit(lambda b: (b.rows, b.n, b.rows)),
        copy_limit(exact_work),
    ]


def _bytes_per_layer(case: Case, size: int) -> float:
    return case.elements_per_layer * (size + 4.0) * 4


ROUND = Operation(
    "round",
    "FlexLoRA's server step in memory",
    "(error - optimal error) / |dW| of what the first client is handed, in its dtype",
    _contenders,
    _accuracy,
    _bytes_per_layer,
)
