"""stack: FLoRA's [p_k s_k A_k] and [B_k] in float32 from the clients' factors, exact."""

from __future__ import annotations

import torch
from torch import Tensor

from fastagg import ops
from fastagg.bench.accuracy import relative_error
from fastagg.bench.baselines.stacking import cat_then_multiply, client_by_client
from fastagg.bench.cases import Case
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.limits import copy_limit
from fastagg.bench.operations.by_module import baseline
from fastagg.bench.operations.slabs import empty_slabs
from fastagg.bench.workload import Workload

__all__ = ["STACK", "peft_contender"]

Outcome = tuple[Tensor, Tensor]
"""The first module's A (R, n) and B (m, R)."""


def _work(workload: Workload) -> Work:
    total = Work()
    for bucket in workload.buckets:
        entries = bucket.modules * bucket.rows * (bucket.m + bucket.n)
        multiplies = bucket.modules * bucket.rows * bucket.n
        total += Work(bytes=entries * (bucket.dtype.itemsize + 4.0), flops=float(multiplies))
    return Work(bytes=total.bytes)  # a multiply an entry is no limit on any machine


def _own(workload: Workload) -> Prepared:
    """Into slabs that are there, as a server has them from its second round on."""
    slabs = [
        (*empty_slabs(bucket, torch.float32), bucket.flats, bucket.slots, bucket.scale)
        for bucket in workload.buckets
    ]

    def run() -> Outcome:
        for slab in slabs:
            ops.stack_(*slab)
        return slabs[0][0][0], slabs[0][1][0].mT

    return Prepared(run)


def _own_fresh(workload: Workload) -> Prepared:
    """Into fresh memory, as the baselines; on a CPU its page faults set the rate."""

    def run() -> list[tuple[Tensor, ...]]:
        return [
            ops.stack(
                b.flats,
                b.slots,
                b.scale,
                modules=b.modules,
                rows=b.rows,
                m=b.m,
                n=b.n,
                dtype=torch.float32,
            )
            for b in workload.buckets
        ]

    for bucket in workload.buckets:
        _ = bucket.slots, bucket.scale
    return Prepared(run)


def peft_contender() -> Contender:
    """add_weighted_adapter(combination_type="cat")."""

    def prepare(workload: Workload) -> Prepared:
        from fastagg.bench.baselines.peft_merge import LiveModel

        module = workload.by_module()[0]
        model = LiveModel(module.As, module.Bs, module.c)
        return Prepared(lambda: model.merge("cat"))

    return Contender("PEFT add_weighted_adapter, cat", "baseline", prepare, _work, one_module=True)


def _accuracy(workload: Workload, outcome: Outcome) -> Accuracy:
    """The largest error of the two factors, and of their product for what scales them otherwise."""
    A, B = workload.by_module()[0].reference()
    found_a, found_b = outcome
    if relative_error(found_a, A) < 1e-3:
        # Python's max would lose a NaN in the second.
        errors = torch.tensor([relative_error(found_a, A), relative_error(found_b, B)])
        return Accuracy(float(errors.max()))
    rows = slice(0, min(256, B.shape[0]))
    return Accuracy(relative_error(found_b[rows].double() @ found_a.double(), B[rows] @ A))


def _contenders(workload: Workload) -> list[Contender]:
    return [
        Contender("fastagg stack_", "fastagg", _own, _work),
        Contender(
            "fastagg stack, fresh memory", "fastagg", _own_fresh, _work,
            outcome=lambda stacks: (stacks[0][0][0], stacks[0][1][0].mT),
        ),
        baseline("mul and cast by client, cat", client_by_client, _work),
        baseline("cat, then multiply", cat_then_multiply, _work),
        peft_contender(),
        copy_limit(_work),
    ]  # fmt: skip


def _bytes_per_layer(case: Case, size: int) -> float:
    return case.elements_per_layer * (size + 3 * 4.0)


STACK = Operation(
    "stack",
    "FLoRA's stack in float32",
    "|stack - exact| / |exact|",
    _contenders,
    _accuracy,
    _bytes_per_layer,
)
