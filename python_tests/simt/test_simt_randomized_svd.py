"""The randomized route on the device, against float64 and against the CPU's promise."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from simt.build import CSRC, SHIM, address, in_every_order, load
from stacks import normal
from svd_accuracy import (
    Reference,
    dead_columns_are_zero,
    loss_of_orthogonality,
    signs_are_fixed,
)
from svd_cases import CASES, Case
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
Found = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    return load("randomized_svd", [*kernels, SHIM / "randomized_svd_exports.cpp"])


def int64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def empty(modules: int, m: int, n: int, r: int, *factors: Tensor) -> Found:
    """Results full of a number that no test expects."""
    wide = torch.float64 in {factor.dtype for factor in factors}
    dtype = torch.float64 if wide else torch.float32
    shapes = ((modules, m, r), (modules, r), (modules, r, n))
    u, s, vt = (torch.full(shape, 7.0, dtype=dtype) for shape in shapes)
    return u, s, vt, torch.full((modules, 3), 7.0, dtype=torch.float64)


def factored(
    library: ctypes.CDLL,
    A: Tensor,
    Bt: Tensor,
    c: Tensor | None,
    rank: int,
    columns: int,
    *,
    power_iterations: int = 2,
    seed: int = 0,
    streams: Tensor | None = None,
) -> Found:
    modules, rows, n = A.shape
    out = empty(modules, Bt.shape[2], n, rank, A, Bt)
    library.simt_randomized_svd(
        *(address(A), int64(CODES[A.dtype]), address(Bt), int64(CODES[Bt.dtype]), address(c)),
        *(int64(rows), int64(columns), int64(power_iterations)),
        *(ctypes.c_uint64(seed), address(streams)),
        *(address(part) for part in out),
        *(int64(modules), int64(Bt.shape[2]), int64(n), int64(rank)),
    )
    return out


def dense(library: ctypes.CDLL, W: Tensor, rank: int, columns: int) -> Found:
    modules, m, n = W.shape
    out = empty(modules, m, n, rank, W)
    library.simt_randomized_svd_dense(
        *(address(W), int64(CODES[W.dtype]), int64(columns), int64(2)),
        *(ctypes.c_uint64(0), address(None)),
        *(address(part) for part in out),
        *(int64(modules), int64(m), int64(n), int64(rank)),
    )
    return out


def factors_of(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    c = None if case.c is None else case.c.double()[None].contiguous()
    return case.A[None].contiguous(), case.B.mT[None].contiguous(), c


def check(reference: Reference, found: Found, rank: int, gap: float) -> None:
    """The promise: an error within `gap` of the optimum and within the certificate; a decomposition."""
    U, S, Vt, stats = (part[0] for part in found)
    error, optimal = reference.error(U, S, Vt), reference.optimal(rank)
    rounding = 2e-6 if S.dtype == torch.float32 else 1e-11
    assert error <= optimal * (1 + gap) + rounding * max(reference.norm, 0.1 * reference.terms)
    # Both sides are rounded: the certificate of fp64 sums, the reference of its own.
    slack = 1e-13 * reference.terms**2
    assert error**2 - optimal**2 <= float(stats[1]) + slack
    assert math.isclose(float(stats[0]), reference.norm**2, rel_tol=1e-9, abs_tol=slack)
    assert loss_of_orthogonality(U, S, Vt) <= 1e-6
    assert dead_columns_are_zero(U, S, Vt) and signs_are_fixed(U, S)
    assert (S[:-1] >= S[1:]).all()


@pytest.mark.parametrize("name", CASES)
def test_hostile_inputs(library, name, rng):
    rank = 8
    case = CASES[name](90, 70, 32, rng)
    reference = Reference.of(case.A, case.B, case.c)
    found = factored(library, *factors_of(case), rank, 2 * rank)
    check(reference, found, rank, gap=0.02)


@pytest.mark.parametrize("power_iterations", [0, 2])
def test_what_cancels_in_part_does_not_drown_the_rest(library, power_iterations, rng):
    # More directions cancel than the sketch has columns, and the norm of dW does not tell.
    case = CASES["clients that cancel in all but two directions"](90, 70, 64, rng)
    reference = Reference.of(case.A, case.B, case.c)
    found = factored(library, *factors_of(case), 4, 8, power_iterations=power_iterations)
    check(reference, found, 4, gap=0.02)


@pytest.mark.parametrize(
    ("a_dtype", "bt_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_order_of_threads_and_grouping_of_modules_change_no_bit(library, a_dtype, bt_dtype, rng):
    A, Bt = normal(rng, 3, 24, 65).to(a_dtype), normal(rng, 3, 24, 71).to(bt_dtype)
    c = torch.rand(3, 24, generator=rng, dtype=torch.float64) + 0.5
    together = in_every_order(library, lambda: factored(library, A, Bt, c, 6, 12))
    for module in range(3):
        stream = torch.tensor([module])
        part = slice(module, module + 1)
        alone = factored(library, A[part], Bt[part], c[part], 6, 12, streams=stream)
        assert all(torch.equal(one[part], other) for one, other in zip(together, alone, strict=True))
        reference = Reference.of(A[module], Bt[module].mT, c[module])
        check(reference, alone, 6, gap=0.1)


def test_the_seed_and_the_stream_choose_the_test_matrix(library, rng):
    A, Bt = normal(rng, 1, 40, 150), normal(rng, 1, 40, 140)
    first = factored(library, A, Bt, None, 4, 6, power_iterations=0, seed=1)
    again = factored(library, A, Bt, None, 4, 6, power_iterations=0, seed=1)
    assert torch.equal(first[0], again[0])
    for seed, stream in ((2, 0), (1, 5)):
        streams = torch.tensor([stream])
        other = factored(library, A, Bt, None, 4, 6, power_iterations=0, seed=seed, streams=streams)
        assert not torch.equal(first[1], other[1])


def test_more_power_iterations_bring_the_error_to_the_optimum(library, rng):
    A, Bt = normal(rng, 1, 40, 150), normal(rng, 1, 40, 140)
    reference = Reference.of(A[0], Bt[0].mT, None)
    gaps = []
    for count in (0, 2, 6):
        U, S, Vt, _ = factored(library, A, Bt, None, 4, 12, power_iterations=count)
        gaps.append(reference.error(U[0], S[0], Vt[0]) / reference.optimal(4) - 1)
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3


@pytest.mark.parametrize("columns", [60, 48], ids=["all rows", "all columns"])
def test_a_sketch_of_the_whole_space_is_exact(library, columns, rng):
    A, Bt = normal(rng, 1, 30, 48), normal(rng, 1, 30, 60)
    found = factored(library, A, Bt, None, 10, columns)
    check(Reference.of(A[0], Bt[0].mT, None), found, 10, gap=1e-5)


@pytest.mark.parametrize("dtype", list(CODES))
def test_dense(library, dtype, rng):
    left, right = normal(rng, 2, 66, 20), normal(rng, 2, 20, 50)
    W = (left @ right).to(dtype)
    found = in_every_order(library, lambda: dense(library, W, 5, 16))
    for module in range(2):
        part = tuple(tensor[module : module + 1] for tensor in found)
        identity = torch.eye(50, dtype=torch.float64)
        check(Reference.of(identity, W[module].double(), None), part, 5, gap=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["A", "Bt", "c"])
def test_a_module_that_is_not_finite_is_nan_and_its_neighbours_are_not(library, which, value, rng):
    A, Bt = normal(rng, 3, 16, 40), normal(rng, 3, 16, 44)
    c = torch.ones(3, 16, dtype=torch.float64)
    {"A": A, "Bt": Bt, "c": c[..., None]}[which][1, 5, 0] = value
    found = factored(library, A, Bt, c, 4, 8)
    for part in found:
        assert part[1].isnan().all() and part[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("modules", "rows", "m", "n", "rank", "columns"),
    [(0, 4, 5, 6, 2, 4), (2, 0, 5, 6, 2, 4), (2, 4, 5, 6, 0, 0), (1, 4, 0, 6, 2, 0), (1, 4, 5, 0, 2, 0)],
)
def test_empty(library, modules, rows, m, n, rank, columns):
    A, Bt = torch.ones(modules, rows, n), torch.ones(modules, rows, m)
    U, S, Vt, stats = factored(library, A, Bt, None, rank, columns)
    if rows == 0 or m == 0 or n == 0:
        assert not U.any() and not S.any() and not Vt.any() and not stats.any()


def test_a_rank_beyond_the_sketch_is_filled_with_zeros(library, rng):
    A, Bt = normal(rng, 1, 5, 9), normal(rng, 1, 5, 7)
    found = factored(library, A, Bt, None, 12, 7)
    check(Reference.of(A[0], Bt[0].mT, None), found, 12, gap=1e-5)
    assert int(found[3][0, 2]) == 5
