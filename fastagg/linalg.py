"""Truncated SVDs of a factored dW = B diag(c) A that is never formed.

Four routes. *gram* and *qr* are exact: error <= optimal error + 2e-6 |dW|_F, singular values within
1e-6 sigma_1, vectors orthonormal to 1e-5, columns beyond rank(dW) zero. *randomized* (Halko,
Martinsson, Tropp, SIAM Review 2011; l = 2r columns, 2 power iterations) and *dense*, which sketches a
dW that it forms, come with a certificate. All are functions of their input, to the bit, on one class
of machines: whatever the number of threads and however modules are batched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastagg import ops

ROUTES = ("auto", "gram", "qr", "randomized", "dense")

_PROMISE = 2e-6  # an exact route's excess error over the optimum, relative to |dW|_F
_MOST_ROWS_OF_AN_EXACT_ROUTE = 1024  # on a GPU; see fastest_route
_FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Decomposition:
    """The best rank-r approximation U diag(S) Vt of each module's dW, and what is known of it.

    U (L, m, r), S (L, r), Vt (L, r, n), float32 (float64 where a factor is); U's and Vt's columns
    beyond the numerical rank are zero. `norm2`, `certificate`, `numerical_rank`: (L,) float64.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    route: str
    norm2: Tensor
    """|dW|_F^2."""
    certificate: Tensor
    """An upper bound of error^2 - optimal^2 at rank r, where error = |dW - U S Vt|_F."""
    numerical_rank: Tensor
    """Singular values above rounding; on a randomized route, among its l = r + oversampling."""

    def kept(self, rank: int) -> Tensor:
        """The share of |dW|_F^2 that the first `rank` singular triplets carry, (L,); 1 for dW = 0."""
        captured = self.S[:, :rank].double().square().sum(1)
        return torch.where(self.norm2 > 0, captured / self.norm2, 1.0).clamp(max=1.0)


@torch.no_grad()
def truncated_svd(
    A: Tensor,
    B: Tensor,
    rank: int,
    *,
    coefficients: Tensor | None = None,
    route: str = "auto",
    oversampling: int | None = None,
    power_iterations: int = 2,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Decomposition]:
    """The rank-`rank` truncated SVD of B diag(c) A, batched over leading dimensions.

    Args:
        A: (..., R, n), B: (..., m, R), float32, bfloat16, float16 or float64, any strides.
        rank: r >= 1. Columns beyond rank(dW) are zero, so r may exceed m, n and R.
        coefficients: (..., R) or (R,), or None for ones.
        route: "gram", "qr", "randomized", "dense", or "auto", which takes the fastest.
        oversampling, power_iterations, seed: of the sketch (default oversampling: r, so l = 2r).

    Returns:
        U (..., m, r), S (..., r), Vt (..., r, n), and the :class:`Decomposition`, batched over one
        dimension: the route that ran, the certificate and the energy kept at each rank. The entry of
        each column of U that is largest in magnitude is positive. Gradients are not tracked.

    Raises:
        ValueError: unlike shapes, dtypes or devices, an unknown route, a NaN or infinity, or singular
            values beyond float32's range where no factor is float64.

    Cost: O(R^2 (m + n) + R^3) exact, O(R l q (m + n)) randomized plus the norm's O(R^2 (m + n)).
    """
    batch = _check_factors(A, B, coefficients, rank, route, oversampling, power_iterations)
    m, rows, n = B.shape[-2], A.shape[-2], A.shape[-1]
    modules = math.prod(batch)
    slab_a = A.expand(*batch, rows, n).reshape(modules, rows, n)
    slab_bt = B.mT.expand(*batch, rows, m).reshape(modules, rows, m)
    if coefficients is not None:
        coefficients = coefficients.expand(*batch, rows).reshape(modules, rows)
        if coefficients.dtype not in (torch.float32, torch.float64):
            coefficients = coefficients.double()
    info = svd_of_stack(
        slab_a,
        slab_bt,
        coefficients,
        rank,
        route=route,
        oversampling=oversampling,
        power_iterations=power_iterations,
        seed=seed,
    )
    if not bool(torch.isfinite(info.norm2).all() & torch.isfinite(info.S).all()):
        raise ValueError(_nonfinite_message(A, B, coefficients))
    U = info.U.reshape(*batch, m, rank)
    return U, info.S.reshape(*batch, rank), info.Vt.reshape(*batch, rank, n), info


@torch.no_grad()
def svd_of_stack(
    A: Tensor,
    Bt: Tensor,
    coefficients: Tensor | None,
    rank: int,
    *,
    route: str = "auto",
    oversampling: int | None = None,
    power_iterations: int = 2,
    seed: int = 0,
    streams: Tensor | None = None,
) -> Decomposition:
    """:func:`truncated_svd` of a bucket's stack: A (L, R, n), Bt (L, R, m), coefficients (L, R).

    A module with non-finite input comes back as NaN; only route "qr" waits for the device.
    """
    oversampling = rank if oversampling is None else oversampling
    if route == "auto":
        route = fastest_route(
            Bt.shape[2],
            A.shape[2],
            A.shape[1],
            rank + oversampling,
            power_iterations,
            device=A.device,
        )
    if route == "gram":
        return _decomposition(route, ops.gram_svd(A, Bt, coefficients, rank=rank))
    if route == "qr":
        return _qr(A, Bt, coefficients, rank)
    if route == "dense":
        W, exponent, rounding = _normalised_dense(A, Bt, coefficients)
        scaled = svd_of_dense(W, rank, oversampling, power_iterations, seed=seed, streams=streams)
        return _rescaled(scaled, exponent, rounding)
    return _decomposition(
        route,
        ops.randomized_svd(
            A,
            Bt,
            coefficients,
            rank=rank,
            oversampling=oversampling,
            power_iterations=power_iterations,
            seed=seed,
            streams=streams,
        ),
    )


def svd_of_dense(
    W: Tensor,
    rank: int,
    oversampling: int | None = None,
    power_iterations: int = 2,
    *,
    seed: int = 0,
    streams: Tensor | None = None,
) -> Decomposition:
    """The rank-`rank` truncated SVD of dense dW (L, m, n) by a sketch. O(L m n l q)."""
    oversampling = rank if oversampling is None else oversampling
    return _decomposition(
        "dense",
        ops.randomized_svd_dense(
            W,
            rank=rank,
            oversampling=oversampling,
            power_iterations=power_iterations,
            seed=seed,
            streams=streams,
        ),
    )


def fastest_route(
    m: int,
    n: int,
    rows: int,
    columns: int,
    power_iterations: int = 2,
    *,
    device: torch.device | None = None,
) -> str:
    """The route that a cost model expects to be fastest for R = `rows` and a sketch of l = `columns`.

    On a CPU (the default) work is counted in fp32 multiply-adds of a large product; what an fp64 Gram
    matrix, the core's SVD and the small factorisations cost in that unit was fitted to ``python -m
    bench.routes``.

    On a GPU the border is drawn by counts, not by a measurement: up to R = 1024 the exact route's fp64
    tensor-core products stay within a few times the reading of the factors, and its R x R core within
    reach of one-sided Jacobi; beyond it the core's O(R^3) in fp64, a sweep at a time, outweighs passes
    over the factors with l columns.
    """
    if device is not None and device.type == "cuda":
        return "gram" if rows <= _MOST_ROWS_OF_AN_EXACT_ROUTE else "randomized"
    costs = route_costs(m, n, rows, columns, power_iterations)
    return min(costs, key=lambda name: costs[name])


def route_costs(
    m: int, n: int, rows: int, columns: int, power_iterations: int = 2
) -> dict[str, float]:
    """Route -> what it takes on a CPU, in fp32 multiply-adds; see :func:`fastest_route`."""
    length = m + n
    core = min(rows, max(m, n))
    l = min(columns, m, n)  # noqa: E741 - the field's name for a sketch's columns
    passes = 2 * (power_iterations + 1)
    gram = 0.7 * rows**2 * length  # |dW|_F^2 of a certificate costs the same two matrices
    exact = gram + 9.0 * core**3 + 6.0 * rows**2 * core + rows * columns * length
    basis = 4.0 * (power_iterations + 2) * l**2 * length + 30.0 * l**3
    randomized = gram + passes * rows * l * length + basis
    dense = m * n * rows + passes * l * m * n + basis
    return {"gram": exact, "randomized": randomized, "dense": dense}


def _check_factors(
    A: Tensor,
    B: Tensor,
    c: Tensor | None,
    rank: int,
    route: str,
    oversampling: int | None,
    power_iterations: int,
) -> tuple[int, ...]:
    """The batch shape that all broadcast to."""
    for name, tensor in (("A", A), ("B", B)):
        if tensor.dim() < 2:
            raise ValueError(f"{name}: expected at least two dimensions, got {tuple(tensor.shape)}")
        if tensor.dtype not in _FACTOR_DTYPES:
            raise ValueError(
                f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
    if A.shape[-2] != B.shape[-1]:
        raise ValueError(
            f"A (..., R, n) and B (..., m, R) must share R, got {tuple(A.shape)} and "
            f"{tuple(B.shape)}"
        )
    if A.device != B.device or (c is not None and c.device != A.device):
        raise ValueError("A, B and coefficients must be on one device")
    if c is not None and (c.dim() == 0 or c.shape[-1] != A.shape[-2]):
        raise ValueError(f"coefficients: expected (..., {A.shape[-2]}), got {tuple(c.shape)}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: expected an integer of at least 1, got {rank!r}")
    for name, value in (("oversampling", oversampling), ("power_iterations", power_iterations)):
        if value is not None and value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    if route not in ROUTES:
        raise ValueError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")
    batches = [A.shape[:-2], B.shape[:-2], *([] if c is None else [c.shape[:-1]])]
    try:
        return tuple(torch.broadcast_shapes(*batches))  # type: ignore[no-untyped-call]
    except RuntimeError:
        shapes = " and ".join(str(tuple(shape)) for shape in batches)
        raise ValueError(f"expected leading dimensions that broadcast, got {shapes}") from None


def _nonfinite_message(A: Tensor, B: Tensor, coefficients: Tensor | None) -> str:
    named = {"A": A, "B": B, "coefficients": coefficients}
    counts = {
        name: int((~torch.isfinite(tensor)).sum())
        for name, tensor in named.items()
        if tensor is not None
    }
    found = ", ".join(f"{count} in {name}" for name, count in counts.items() if count)
    if found:
        return (
            f"NaN or infinity in the input ({found}): expected finite factors; leave out the client "
            "that sent them"
        )
    return (
        "the singular values of the product overflow their dtype: expected factors whose product it "
        "holds; scale the coefficients down, or pass float64 factors"
    )


def _decomposition(route: str, result: tuple[Tensor, Tensor, Tensor, Tensor]) -> Decomposition:
    U, S, Vt, stats = result
    norm2, certificate, numerical_rank = stats.unbind(1)
    return Decomposition(U, S, Vt, route, norm2, certificate, numerical_rank)


def _exponent_of(largest: Tensor) -> Tensor:
    """The exponent (L,) of the largest magnitude, 0 where that is zero or not finite."""
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, torch.frexp(torch.where(usable, largest, 1.0))[1], 0)


def _normalised_dense(
    A: Tensor, Bt: Tensor, coefficients: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dW 2^-exponent (L, m, n): entries of a dW whose factors fp32 holds may not fit into fp32.

    And the rounding (L,) of that sum: clients that cancel each other leave it alone.
    """
    wide = torch.float64 in (A.dtype, Bt.dtype)
    dtype = torch.float64 if wide else torch.float32
    modules, rows, n = A.shape
    if rows == 0 or n == 0 or Bt.shape[2] == 0:
        zero = A.new_zeros(modules, dtype=torch.float64)
        return A.new_zeros((modules, Bt.shape[2], n), dtype=dtype), zero, zero
    c = A.new_ones(A.shape[:2], dtype=torch.float64) if coefficients is None else coefficients
    # Row by row, |c_r| |a_r|_max |b_r|_max bounds the terms.
    scale_a = torch.exp2(-_exponent_of(A.abs().amax(2).double()).double())
    scale_b = torch.exp2(-_exponent_of(Bt.abs().amax(2).double()).double())
    middle = c.double() / (scale_a * scale_b)
    exponent = _exponent_of(middle.abs().amax(1))
    middle = middle * torch.exp2(-exponent.double())[:, None]
    left = A.double() * scale_a[..., None]
    right = Bt.double() * scale_b[..., None]
    terms = (middle * left.norm(dim=2) * right.norm(dim=2)).norm(dim=1)
    rounding = 2 * torch.finfo(dtype).eps * terms
    if wide:
        return (right * middle[..., None]).mT @ left, exponent, rounding
    return ops.reconstruct(left.to(dtype), right.to(dtype), middle), exponent, rounding


def _rescaled(d: Decomposition, exponent: Tensor, rounding: Tensor) -> Decomposition:
    """The decomposition of W 2^exponent, where W is off by `rounding`."""
    scale = torch.exp2(exponent.double())
    live = ~(d.S.double() <= 0.5 * rounding[:, None])  # NaN stays NaN
    energy = d.S.double().square()
    dropped = torch.where(live, 0.0, energy).sum(1)
    # The error of W is at most e, e^2 = |W|^2 - captured + certificate; it and the optimal error move
    # by at most the rounding.
    certificate = d.certificate + dropped
    error = (d.norm2 - energy.sum(1) + certificate).clamp(min=0).sqrt()
    certificate = certificate + 4 * rounding * (error + rounding)
    kept = live.sum(1)
    return replace(
        d,
        U=torch.where(live[:, None], d.U, 0.0),
        S=torch.where(live, d.S.double() * scale[:, None], 0.0).to(d.S.dtype),
        Vt=torch.where(live[..., None], d.Vt, 0.0),
        norm2=d.norm2 * scale**2,
        certificate=certificate * scale**2,
        numerical_rank=torch.where(kept < d.S.shape[1], kept.double(), d.numerical_rank),
    )


def _qr(A: Tensor, Bt: Tensor, coefficients: Tensor | None, rank: int) -> Decomposition:
    """Householder QR of both factors in fp64 and the SVD of the R x R core, by LAPACK."""
    modules, rows, n = A.shape
    m = Bt.shape[2]
    dtype = torch.float64 if torch.float64 in (A.dtype, Bt.dtype) else torch.float32
    U = A.new_zeros((modules, m, rank), dtype=dtype)
    S = A.new_zeros((modules, rank), dtype=dtype)
    Vt = A.new_zeros((modules, rank, n), dtype=dtype)
    stats = A.new_zeros((modules, 3), dtype=torch.float64)
    for l in range(modules):  # noqa: E741
        a, b = A[l].double(), Bt[l].double()
        c = a.new_ones(rows) if coefficients is None else coefficients[l].double()
        if not bool(torch.isfinite(a).all() & torch.isfinite(b).all() & torch.isfinite(c).all()):
            for out in (U[l], S[l], Vt[l], stats[l]):
                out.fill_(math.nan)
            continue
        q_b, r_b = torch.linalg.qr(b.mT)
        q_a, r_a = torch.linalg.qr(a.mT)
        u, s, vt = torch.linalg.svd((r_b * c) @ r_a.mT, full_matrices=False)
        # What rounding leaves of the largest terms of the sum is not a singular value.
        terms = float((c.abs() * a.norm(dim=1) * b.norm(dim=1)).norm())
        noise = 8 * max(rows, 1) * torch.finfo(torch.float64).eps * terms
        found = int((s > noise).sum())
        kept = min(found, rank)
        left, right = q_b @ u[:, :kept], vt[:kept] @ q_a.mT
        if kept:
            pivot = left.abs().argmax(0)
            sign = torch.where(left.gather(0, pivot[None])[0] < 0, -1.0, 1.0)
            U[l, :, :kept], Vt[l, :kept] = left * sign, right * sign[:, None]
            S[l, :kept] = s[:kept]
        total = s[:found].square().sum()
        tail = s[kept:found].square().sum()
        excess = _PROMISE * total.sqrt() + noise
        bound = excess * (2 * tail.sqrt() + excess)
        stats[l] = torch.stack([total, bound, total.new_tensor(float(found))])
    return _decomposition("qr", (U, S, Vt, stats))


