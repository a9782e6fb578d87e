"""svd: from the clients' factors to the best rank-r approximation of each module's dW, by every route.

Flops are textbook counts (Golub and Van Loan, Matrix Computations, 4th ed., figures 5.2.1 and 8.6.1): a
Householder QR of a x b and its thin Q, 4 b^2 (a - b/3); a thin SVD, 6 a b^2 + 20 b^3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastagg import linalg
from fastagg.bench.accuracy import of_approximation
from fastagg.bench.baselines.decomposition import dense_svd, dense_svd_lowrank, qr_core_svd
from fastagg.bench.cases import Case
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.limits import copy_limit, product_limit, wide_product_limit
from fastagg.bench.operations.by_module import baseline, factor_lists
from fastagg.bench.operations.slabs import slabs_of
from fastagg.bench.workload import Bucket, Workload

__all__ = [
    "SVD",
    "dense_lowrank_work",
    "dense_svd_work",
    "exact_work",
    "qr_core_work",
    "rank_of",
    "route_work",
]

Outcome = tuple[Tensor, Tensor]
"""The first module's U S (m, r) and Vt (r, n)."""

_POWER_ITERATIONS = 2


def rank_of(workload: Workload, bucket: Bucket) -> int:
    """r: the largest client's, or what the module can have."""
    return min(workload.rank, bucket.m, bucket.n, bucket.rows)


def _qr_flops(length: int, columns: int) -> float:
    tall, thin = max(length, columns), min(length, columns)
    return 4.0 * thin**2 * (tall - thin / 3)


def _svd_flops(a: int, b: int) -> float:
    tall, thin = max(a, b), min(a, b)
    return 6.0 * tall * thin**2 + 20.0 * thin**3


def _by_bucket(workload: Workload, of: Callable[[Bucket, int], Work]) -> Work:
    total = Work()
    for bucket in workload.buckets:
        r = rank_of(workload, bucket)
        ends = (bucket.rows * bucket.dtype.itemsize + 4.0 * r) * (bucket.m + bucket.n)
        work = of(bucket, r) + Work(bytes=ends)
        total += work.times(bucket.modules)
    return total


def _gram(b: Bucket, r: int) -> Work:
    """Both Gram matrices, of which half is enough; the core's SVD; the two projections."""
    R, length = b.rows, b.m + b.n
    return Work(wide_flops=float(R) ** 2 * length + _svd_flops(R, R) + 2.0 * r * R * length)


def _qr(b: Bucket, r: int) -> Work:
    R, length = b.rows, b.m + b.n
    k_b, k_a = min(b.m, R), min(b.n, R)
    core = 2.0 * k_b * k_a * R + _svd_flops(k_b, k_a)
    return Work(wide_flops=_qr_flops(b.m, R) + _qr_flops(b.n, R) + core + 2.0 * r * R * length)


def _randomized(b: Bucket, r: int) -> Work:
    """2 (q + 1) passes over the factors with l columns; |dW|^2 of the certificate needs both Gram
    matrices."""
    columns = min(2 * r, b.m, b.n)
    passes = 2 * (_POWER_ITERATIONS + 1)
    length = b.m + b.n
    return Work(flops=2.0 * passes * b.rows * columns * length, wide_flops=float(b.rows) ** 2 * length)


def _dense(b: Bucket, r: int) -> Work:
    columns = min(2 * r, b.m, b.n)
    passes = 2 * (_POWER_ITERATIONS + 1)
    return Work(flops=2.0 * b.m * b.n * (b.rows + passes * columns))


def _dense_svd(b: Bucket, r: int) -> Work:
    return Work(flops=2.0 * b.m * b.n * b.rows + _svd_flops(b.m, b.n))


def _dense_full_svd(b: Bucket, r: int) -> Work:
    tall, thin = max(b.m, b.n), min(b.m, b.n)
    return Work(flops=2.0 * b.m * b.n * b.rows + 4.0 * tall**2 * thin + 22.0 * thin**3)


def _dense_lowrank(b: Bucket, r: int) -> Work:
    return Work(flops=2.0 * b.m * b.n * (b.rows + 6 * (r + 8)))


def _qr_core(b: Bucket, r: int) -> Work:
    return Work(flops=_qr(b, r).wide_flops)


_ROUTES = {"gram": _gram, "qr": _qr, "randomized": _randomized, "dense": _dense}


def route_work(workload: Workload, route: str) -> Work:
    """What a route, or the one that `auto` takes, moves and computes."""

    def of(bucket: Bucket, r: int) -> Work:
        taken = route
        if route == "auto":
            columns = 2 * r
            taken = linalg.fastest_route(
                bucket.m, bucket.n, bucket.rows, columns, _POWER_ITERATIONS, device=bucket.device
            )
        return _ROUTES[taken](bucket, r)

    return _by_bucket(workload, of)


def exact_work(workload: Workload) -> Work:
    """The exact route's."""
    return route_work(workload, "gram")


def qr_core_work(workload: Workload) -> Work:
    """Two QR and the core's SVD, in float32."""
    return _by_bucket(workload, _qr_core)


def dense_svd_work(workload: Workload) -> Work:
    """Dense dW and its thin SVD."""
    return _by_bucket(workload, _dense_svd)


def dense_lowrank_work(workload: Workload) -> Work:
    """Dense dW and six passes of torch.svd_lowrank over it."""
    return _by_bucket(workload, _dense_lowrank)


def _own(route: str) -> Contender:
    def prepare(workload: Workload) -> Prepared:
        slabs = slabs_of(workload)

        def run() -> list[linalg.Decomposition]:
            found = []
            for s in slabs:
                s.fill()
                rank = rank_of(workload, s.bucket)
                found.append(linalg.svd_of_stack(s.A, s.Bt, s.c, rank, route=route))
            return found

        return Prepared(run)

    return Contender(
        f"fastagg {route}", "fastagg", prepare, lambda w: route_work(w, route), outcome=_first
    )


def _first(found: Any) -> Outcome:
    return found[0].U[0] * found[0].S[0], found[0].Vt[0]


def _baseline(
    name: str, function: Callable[..., Any], work: Callable[[Workload], Work], dense: bool
) -> Contender:
    def arguments(workload: Workload) -> list[tuple[Any, ...]]:
        ranks = [rank_of(workload, b) for b in workload.buckets for _ in range(b.modules)]
        return [(*lists, rank) for lists, rank in zip(factor_lists(workload), ranks, strict=True)]

    def memory(workload: Workload) -> float:
        bucket = workload.buckets[0]
        return 24.0 * bucket.m * bucket.n if dense else 24.0 * bucket.rows * (bucket.m + bucket.n)

    return baseline(name, function, work, arguments=arguments, memory=memory)


def _peft() -> Contender:
    """add_weighted_adapter(combination_type="svd"): dense dW and its SVD with full matrices."""

    def prepare(workload: Workload) -> Prepared:
        from fastagg.bench.baselines.peft_merge import LiveModel

        module = workload.by_module()[0]
        model = LiveModel(module.As, module.Bs, module.c)
        rank = rank_of(workload, workload.buckets[0])
        return Prepared(lambda: model.merge("svd", rank))

    return Contender(
        "PEFT add_weighted_adapter, svd",
        "baseline",
        prepare,
        lambda w: _by_bucket(w, _dense_full_svd),
        outcome=lambda factors: (factors[1], factors[0]),
        one_module=True,
    )


def _accuracy(workload: Workload, outcome: Outcome) -> Accuracy:
    return of_approximation(workload.by_module()[0], *outcome)


def _contenders(workload: Workload) -> list[Contender]:
    return [
        *(_own(route) for route in ("auto", "gram", "qr", "randomized", "dense")),
        _baseline("cat + 2 QR + core SVD", qr_core_svd, qr_core_work, dense=False),
        _baseline("dense + svd_lowrank", dense_svd_lowrank, dense_lowrank_work, dense=True),
        _baseline("dense + linalg.svd", dense_svd, dense_svd_work, dense=True),
        _peft(),
        product_limit(lambda b: (b.m, b.rows, 2 * max(b.ranks))),
        wide_product_limit(lambda b: (b.rows, b.n, b.rows)),
        copy_limit(exact_work),
    ]


def _bytes_per_layer(case: Case, size: int) -> float:
    return case.elements_per_layer * (size + 4.0) * 3


SVD = Operation(
    "svd",
    "the best rank-r approximation of dW",
    "(error - optimal error) / |dW|",
    _contenders,
    _accuracy,
    _bytes_per_layer,
)
