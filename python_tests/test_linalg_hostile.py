"""Every promise of fastagg.truncated_svd on every hostile input, by every route."""

from __future__ import annotations

import pytest
import torch
from svd_accuracy import (
    Reference,
    dead_columns_are_zero,
    loss_of_orthogonality,
    signs_are_fixed,
)
from svd_cases import CASES, Case

import fastagg
from fastagg.linalg import ROUTES, Decomposition

EXACT = ("gram", "qr")
SHAPES = [(96, 80, 40, 16), (150, 210, 170, 32), (60, 44, 90, 64)]
"""m, n, R and r: more rows than columns and fewer, r above min(m, n, R) too."""

EXCESS = 2e-6  # error - optimal error, relative to |dW|_F
SIGMA = 1e-6  # relative to the largest singular value
ORTHOGONAL = 1e-5
FLAT_GAP = 0.03  # of a sketch of 2r columns where the spectrum is flat


def floor(reference: Reference, S: torch.Tensor) -> float:
    """What no result can be nearer than: S is float32, and this reference float64."""
    subnormal = 2.0**-149 * len(S) ** 0.5 if S.dtype == torch.float32 else 0.0
    return subnormal + 1e-14 * reference.terms


def check(case: Case, rank: int, route: str, seed: int) -> Decomposition:
    U, S, Vt, info = fastagg.truncated_svd(
        case.A, case.B, rank, coefficients=case.c, route=route, seed=seed
    )
    reference = Reference.of(case.A, case.B, case.c)
    norm, optimal = reference.norm, reference.optimal(rank)
    unavoidable = floor(reference, S)
    assert route in ("auto", info.route)
    exact = info.route in EXACT

    assert loss_of_orthogonality(U, S, Vt) <= ORTHOGONAL
    assert dead_columns_are_zero(U, S, Vt)
    assert signs_are_fixed(U, S)
    assert (S.diff() <= 0).all()

    # No singular value is too large; fp32 sums of cancelling terms leave their rounding.
    rounding = SIGMA * (float(reference.sigma[0]) if exact else reference.terms + norm) + unavoidable
    above = S.double() - reference.leading(rank)
    assert float(above.max()) <= rounding
    error = reference.error(U, S, Vt)
    if exact:
        assert float(above.abs().max()) <= rounding
        assert error <= optimal + EXCESS * norm + unavoidable
        assert float(info.norm2) ** 0.5 == pytest.approx(norm, rel=1e-9, abs=unavoidable)
    else:
        within_sketch = int((reference.sigma > SIGMA * norm).sum()) <= 2 * rank
        gap = EXCESS if within_sketch else FLAT_GAP
        assert error <= optimal + gap * norm + EXCESS * reference.terms + unavoidable
        # A product that is formed in fp32 has the norm of what it is rounded to.
        assert float(info.norm2) ** 0.5 == pytest.approx(
            norm, rel=1e-6, abs=EXCESS * reference.terms + unavoidable
        )

    certificate = float(info.certificate)
    assert certificate >= 0
    assert error**2 - optimal**2 <= certificate + unavoidable * (2 * optimal + unavoidable)
    # And it says something: no more than a part of |dW|^2, but for the rounding of cancelling terms.
    assert certificate <= 1e-4 * reference.terms**2 + norm**2

    if case.rank is not None:
        live = int((S > 0).sum())
        assert live == min(case.rank, rank)
        # A sketch sees the rank among its 2r columns, or all of it where it spans a small side whole.
        whole = exact or min(len(U), Vt.shape[1]) <= max(4 * rank, 64)
        assert int(info.numerical_rank) == (case.rank if whole else min(case.rank, 2 * rank))
    kept = info.kept(rank)
    assert 0 <= float(kept) <= 1
    if norm > 1e-3 * reference.terms:
        expected = float(S.double().square().sum()) / norm**2
        allowed = 1e-6 if exact else 1e-6 + 4 * EXCESS * reference.terms / norm
        assert float(kept) == pytest.approx(min(expected, 1.0), abs=allowed)
    return info


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CASES)
def test_the_promise(name: str, route: str, rng: torch.Generator, seed: int) -> None:
    for m, n, R, rank in SHAPES:
        check(CASES[name](m, n, R, rng), rank, route, seed)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("m", "n", "R", "rank"),
    [(1, 1, 1, 1), (1, 40, 9, 3), (40, 1, 9, 3), (30, 20, 1, 4), (5, 7, 30, 40), (7, 5, 3, 2)],
)
def test_the_smallest_shapes(
    m: int, n: int, R: int, rank: int, route: str, rng: torch.Generator, seed: int
) -> None:
    check(CASES["flat spectrum"](m, n, R, rng), rank, route, seed)


@pytest.mark.parametrize("route", EXACT)
def test_rank_one_of_a_large_module(route: str, rng: torch.Generator, seed: int) -> None:
    check(CASES["flat spectrum"](1100, 600, 24, rng), 1, route, seed)
    check(CASES["ten identical clients"](600, 1100, 160, rng), 64, route, seed)
    check(CASES["mixed columns decay over 16 decades"](512, 512, 160, rng), 64, route, seed)
    check(CASES["clients that cancel but for 1e-7"](512, 512, 160, rng), 64, route, seed)


@pytest.mark.parametrize("route", ROUTES)
def test_singular_values_beyond_float32_are_refused(route: str, rng: torch.Generator) -> None:
    """Finite factors whose product float32 cannot hold: an error, not an infinite S."""
    case = CASES["flat spectrum"](30, 20, 8, rng)
    A, B = case.A * 1e20, case.B * 1e20
    with pytest.raises(ValueError, match=r"overflow their dtype.*float64"):
        fastagg.truncated_svd(A, B, 4, route=route)
    wide = Case(A.double(), B.double())
    check(wide, 4, route, 0)
    check(Case(A, B, torch.full((8,), 1e-10)), 4, route, 0)


@pytest.mark.parametrize("route", ROUTES)
def test_singular_values_below_float32(route: str, rng: torch.Generator) -> None:
    """dW of 1e-42 has singular values in float32's subnormal range: rounded to it, never lost."""
    case = CASES["flat spectrum"](30, 20, 8, rng)
    info = check(Case(case.A * 1e-22, case.B * 1e-22), 4, route, 0)
    assert int(info.numerical_rank) == 8
    check(Case(case.A.double() * 1e-60, case.B.double() * 1e-60), 4, route, 0)


BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("where", ["A", "B", "coefficients"])
@pytest.mark.parametrize("value", BAD)
def test_non_finite_input_is_refused(
    value: float, where: str, route: str, rng: torch.Generator
) -> None:
    given = {
        "A": torch.randn(3, 12, 20, generator=rng),
        "B": torch.randn(3, 30, 12, generator=rng),
        "coefficients": torch.rand(3, 12, generator=rng),
    }
    given[where][1, 5, ...] = torch.where(
        torch.arange(given[where][1, 5].numel()).view_as(given[where][1, 5]) == 0,
        value,
        given[where][1, 5],
    )
    with pytest.raises(ValueError, match=f"NaN or infinity in the input \\(1 in {where}\\)"):
        fastagg.truncated_svd(
            given["A"], given["B"], 4, coefficients=given["coefficients"], route=route
        )


@pytest.mark.parametrize("route", ROUTES)
def test_an_infinity_beside_zeros_is_refused(route: str, rng: torch.Generator) -> None:
    """inf * 0 in a row whose coefficient, or whose other factor, is zero."""
    A, B = torch.randn(6, 20, generator=rng), torch.randn(30, 6, generator=rng)
    bad = A.clone()
    bad[2, 7] = torch.inf
    silent = B.clone()
    silent[:, 2] = 0
    c = torch.ones(6)
    c[2] = 0
    with pytest.raises(ValueError, match="1 in A"):
        fastagg.truncated_svd(bad, silent, 4, route=route)
    with pytest.raises(ValueError, match="1 in A"):
        fastagg.truncated_svd(bad, B, 4, coefficients=c, route=route)
