"""The exact SVD route: its promise on every hostile input, and what no bit of it depends on."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, fields

import pytest
import torch
from simt.build import CSRC, SHIM, address, in_every_order, load
from stacks import normal, product, random_stack
from svd_accuracy import (
    Reference,
    dead_columns_are_zero,
    loss_of_orthogonality,
    signs_are_fixed,
)
from svd_cases import CASES, Case
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
SHAPES = [(48, 40, 20, 8), (30, 22, 40, 32)]
"""m, n, R and r: r above min(m, n, R) too."""

EXCESS = 2e-6  # error - optimal error, relative to |dW|_F
SIGMA = 1e-6  # relative to the largest singular value
ORTHOGONAL = 1e-5


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    return load("gram_svd", [*kernels, SHIM / "gram_svd_exports.cpp"])


@dataclass(frozen=True)
class Decomposition:
    U: Tensor
    S: Tensor
    Vt: Tensor
    stats: Tensor

    def all(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def module(self, index: int) -> Decomposition:
        return Decomposition(*(each[index : index + 1] for each in self.all()))


def same_bits(a: Decomposition, b: Decomposition) -> bool:
    pairs = zip(a.all(), b.all(), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def int64s(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def unwritten(A: Tensor, Bt: Tensor, rank: int) -> tuple[Decomposition, bool]:
    """Results that nothing was written to, and whether they are float64."""
    (modules, _, n), m = A.shape, Bt.shape[2]
    wide = torch.float64 in (A.dtype, Bt.dtype)
    shapes = ((modules, m, rank), (modules, rank), (modules, rank, n))
    dtype = torch.float64 if wide else torch.float32
    U, S, Vt = (torch.full(shape, torch.nan, dtype=dtype) for shape in shapes)
    return Decomposition(U, S, Vt, torch.full((modules, 3), torch.nan, dtype=torch.float64)), wide


def sizes_of(A: Tensor, Bt: Tensor, rank: int) -> ctypes.Array[ctypes.c_int64]:
    return int64s(*A.shape[:2], Bt.shape[2], A.shape[2], rank)


def gram_svd(
    library: ctypes.CDLL, A: Tensor, Bt: Tensor, c: Tensor | None, rank: int, chunk: int = 0
) -> Decomposition:
    A, Bt = A.contiguous(), Bt.contiguous()
    c = None if c is None else c.double().contiguous()
    out, wide = unwritten(A, Bt, rank)
    library.simt_gram_svd(
        *(address(A), address(Bt), int64s(CODES[A.dtype], CODES[Bt.dtype]), address(c)),
        *(sizes_of(A, Bt, rank), ctypes.c_int64(wide), *map(address, out.all())),
        ctypes.c_int64(chunk),
    )
    return out


def check(case: Case, found: Decomposition) -> None:
    """All that an exact route promises of one module."""
    U, S, Vt, stats = (each[0] for each in found.all())
    rank = len(S)
    reference = Reference.of(case.A, case.B, case.c)
    # What no result can be nearer than: S may be float32, and the reference is float64.
    subnormal = 2.0**-149 * rank**0.5 if S.dtype == torch.float32 else 0.0
    unavoidable = subnormal + 1e-14 * reference.terms
    norm, optimal = reference.norm, reference.optimal(rank)

    assert loss_of_orthogonality(U, S, Vt) <= ORTHOGONAL
    assert dead_columns_are_zero(U, S, Vt)
    assert signs_are_fixed(U, S)
    assert (S.diff() <= 0).all()
    rounding = SIGMA * float(reference.sigma[0]) + unavoidable
    assert float((S.double() - reference.leading(rank)).abs().max()) <= rounding
    error = reference.error(U, S, Vt)
    assert error <= optimal + EXCESS * norm + unavoidable

    squared_norm, certificate, numerical_rank = stats.tolist()
    assert squared_norm**0.5 == pytest.approx(norm, rel=1e-9, abs=unavoidable)
    assert error**2 - optimal**2 <= certificate + unavoidable * (2 * optimal + unavoidable)
    assert 0 <= certificate <= 1e-4 * reference.terms**2 + norm**2
    if case.rank is not None:
        assert int((S > 0).sum()) == min(case.rank, rank)
        assert int(numerical_rank) == case.rank


@pytest.mark.parametrize("name", CASES)
def test_the_promise(name: str, library: ctypes.CDLL, rng: torch.Generator) -> None:
    for m, n, R, rank in SHAPES:
        case = CASES[name](m, n, R, rng)
        c = None if case.c is None else case.c[None]
        check(case, gram_svd(library, case.A[None], case.B.mT[None], c, rank))


@pytest.mark.parametrize(
    ("m", "n", "R", "rank"),
    [(1, 1, 1, 1), (1, 40, 9, 3), (40, 1, 9, 3), (30, 20, 1, 4), (5, 7, 30, 40), (7, 5, 3, 2)],
)
def test_the_smallest_shapes(
    m: int, n: int, R: int, rank: int, library: ctypes.CDLL, rng: torch.Generator
) -> None:
    case = CASES["flat spectrum"](m, n, R, rng)
    check(case, gram_svd(library, case.A[None], case.B.mT[None], None, rank))


@pytest.mark.parametrize("dtypes", list(itertools.product(CODES, repeat=2)), ids=str)
def test_every_dtype_in_every_order(
    dtypes: tuple[torch.dtype, torch.dtype], library: ctypes.CDLL, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, 2, 5, 35, 33, *dtypes)
    # The second module is one that the Gram matrices fail.
    A[1, 2:4], Bt[1, 2:4] = A[1, :2], -Bt[1, :2]
    Bt[1, 0] *= 1 - 2.0**-7
    c = torch.rand(2, 5, generator=rng, dtype=torch.float64)
    c[1] = 1
    found = Decomposition(*in_every_order(library, lambda: gram_svd(library, A, Bt, c, 4).all()))
    assert found.U.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    for i in range(2):
        check(Case(A[i], Bt[i].mT, c[i]), found.module(i))


HOSTILE = (
    *("flat spectrum", "mixed columns decay over 16 decades", "ten nearly identical clients"),
    *("all B are zero", "clients that cancel each other", "clients that cancel but for 1e-5"),
    *("rows decay over 16 decades", "clients that cancel but for 1e-7", "tied singular values"),
)


def bucket(m: int, n: int, R: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Modules of every way through the route, more lossy ones than blocks that take them."""
    cases = [CASES[name](m, n, R, rng) for name in HOSTILE]
    return torch.stack([case.A for case in cases]), torch.stack([case.B.mT for case in cases])


@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_a_module_has_the_same_bits_alone_and_in_a_bucket(
    chunk: int, library: ctypes.CDLL, rng: torch.Generator
) -> None:
    A, Bt = bucket(34, 41, 20, rng)
    together = gram_svd(library, A, Bt, None, 6, chunk)
    for i in range(len(A)):
        alone = gram_svd(library, A[i : i + 1], Bt[i : i + 1], None, 6)
        assert same_bits(alone, together.module(i))


def test_a_bucket_has_the_same_bits_in_every_order(library: ctypes.CDLL, rng: torch.Generator) -> None:
    A, Bt = bucket(23, 19, 10, rng)
    in_every_order(library, lambda: gram_svd(library, A, Bt, None, 5).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["A", "Bt", "c"])
def test_a_module_that_is_not_finite_is_nan_throughout_and_harms_no_other(
    where: str, value: float, library: ctypes.CDLL, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, 4, 6, 20, 17)
    c = torch.rand(4, 6, generator=rng)
    c[3] = 0
    expected = gram_svd(library, A, Bt, c, 3)
    given = {"A": A, "Bt": Bt, "c": c}
    for module in (1, 3):
        # In a row whose coefficient, or whose other factor, may be zero.
        given[where][module, 5].reshape(-1)[-1] = value
    found = gram_svd(library, A, Bt, c, 3)
    for module in (1, 3):
        assert all(bool(each.isnan().all()) for each in found.module(module).all())
    for module in (0, 2):
        assert same_bits(expected.module(module), found.module(module))


@pytest.mark.parametrize(
    ("modules", "rows", "m", "n", "rank"),
    [
        *[(0, 3, 4, 5, 2), (2, 0, 4, 5, 2), (2, 3, 0, 5, 2), (2, 3, 4, 0, 2), (2, 3, 4, 5, 0)],
        (1, 0, 0, 0, 0),
    ],
)
def test_empty_sizes(
    modules: int, rows: int, m: int, n: int, rank: int, library: ctypes.CDLL, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, modules, rows, m, n)
    U, S, Vt, stats = gram_svd(library, A, Bt, None, rank).all()
    # Nothing carries weight, and nothing is left unwritten, which would be NaN.
    assert not (U.any() or S.any() or Vt.any())
    torch.testing.assert_close(stats[:, 0], product(A, Bt).square().sum((1, 2)))


@pytest.mark.parametrize(("m", "n", "rows", "rank"), [(37, 29, 12, 5), (9, 33, 14, 14), (3, 2, 5, 1)])
def test_qr_of_the_lossy_modules_alone(
    m: int, n: int, rows: int, rank: int, library: ctypes.CDLL, rng: torch.Generator
) -> None:
    """Modules that need no QR take it too when they are told to; the others are left as they are."""
    modules = 7
    A, Bt = random_stack(rng, modules, rows, m, n, torch.bfloat16, torch.float32)
    A[3], Bt[4, rows // 2 :] = A[2], 0
    alpha, beta = torch.rand(2, modules, rows, generator=rng, dtype=torch.float64).unbind()
    lossy = torch.tensor([1, 0, 1, 1, 1, 0, 1], dtype=torch.int32)

    def run() -> tuple[Tensor, ...]:
        out, wide = unwritten(A, Bt, rank)
        kept = torch.full((modules,), -1, dtype=torch.int32)
        library.simt_qr_svd(
            *(address(A), address(Bt), int64s(CODES[A.dtype], CODES[Bt.dtype])),
            *(address(alpha), address(beta), address(lossy), sizes_of(A, Bt, rank)),
            *(ctypes.c_int64(wide), *map(address, out.all()), address(kept)),
        )
        return (*out.all(), kept)

    *results, kept = in_every_order(library, run)
    found = Decomposition(*results)
    for i in range(modules):
        if not lossy[i]:
            assert kept[i] == -1
            assert all(bool(each.isnan().all()) for each in found.module(i).all())
            continue
        live = int(kept[i])
        reference = Reference.of(A[i], Bt[i].mT, alpha[i] * beta[i])
        assert live == min(rank, m, n, rows // 2 if i == 4 else rows)
        U, S, Vt = found.U[i, :, :live], found.S[i, :live], found.Vt[i, :live]
        assert loss_of_orthogonality(U, S, Vt) <= 1e-6
        error = reference.error(U, S, Vt)
        assert error <= reference.optimal(rank) + EXCESS * reference.norm


@pytest.mark.parametrize("r", [1, 3, 31, 32, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_zeros_and_nans(
    dtype: torch.dtype, r: int, library: ctypes.CDLL, rng: torch.Generator
) -> None:
    """Few different values, so that many entries of a column tie."""
    modules, m, n = 4, 67, 4099
    U = torch.randint(-2, 3, (modules, m, r), generator=rng).to(dtype)
    S, Vt = torch.rand(modules, r, generator=rng).to(dtype), normal(rng, modules, r, n).to(dtype)
    stats = torch.rand(modules, 3, generator=rng, dtype=torch.float64)
    kept = torch.tensor([r, r // 2, 0, r], dtype=torch.int32)
    nonfinite = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    # What is not kept was never written.
    for each in (U.mT, S, Vt):
        for i in range(modules):
            each[i, int(kept[i]) :] = torch.nan

    def run() -> tuple[Tensor, ...]:
        out = [each.clone() for each in (U, S, Vt, stats)]
        library.simt_finish(
            *(int64s(modules, 0, m, n, r), ctypes.c_int64(dtype == torch.float64)),
            *(address(kept), address(nonfinite), *map(address, out)),
        )
        return tuple(out)

    found = in_every_order(library, run)
    live = (torch.arange(r) < kept[:, None]).to(dtype)
    first = U.nan_to_num().abs().argmax(1, keepdim=True)
    sign = torch.where(U.gather(1, first)[:, 0] < 0, -1.0, 1.0).to(dtype) * live
    expected = [
        *(torch.nan_to_num(U) * sign[:, None], torch.nan_to_num(S) * live),
        *(torch.nan_to_num(Vt) * sign[..., None], stats.clone()),
    ]
    for each in expected:
        each[3] = torch.nan
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x.nan_to_num(nan=9.0), y.nan_to_num(nan=9.0))
