"""The errors beside the times are those of dense float64 matrices, and move by what was put in."""

from __future__ import annotations

import pytest
import torch
from small_cases import MANY_ROWS, UNEVEN, dense, drawn, tail

from fastagg.bench.accuracy import of_approximation, relative_error
from fastagg.bench.workload import Module


def best(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank], Vt[:rank]


def by_hand(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    error = torch.linalg.norm(matrix - left.double() @ right.double())
    return float((error - tail(matrix, right.shape[0])) / torch.linalg.norm(matrix))


def module_of(factors: list[tuple[torch.Tensor, torch.Tensor]], c: list[float]) -> Module:
    return Module([A for A, _ in factors], [B for _, B in factors], c)


def gaussian(rng: torch.Generator, m: int, n: int, ranks: tuple[int, ...]) -> Module:
    factors = [
        (torch.randn(r, n, generator=rng).double(), torch.randn(m, r, generator=rng).double())
        for r in ranks
    ]
    return module_of(factors, [0.3 + 0.2 * k for k in range(len(ranks))])


SHAPES = {
    "few rows": (20, 30, (4, 3, 2)),
    "more rows than either side": (12, 16, (7, 6, 8)),
    "more rows than one side": (40, 10, (7, 6)),
    "one client of rank 1": (9, 7, (1,)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_best_approximation_has_no_excess_and_others_have_what_dense_matrices_say(
    shape: tuple[int, int, tuple[int, ...]], rank: int, rng: torch.Generator
) -> None:
    module = gaussian(rng, *shape)
    W = dense(module)
    left, right = best(W, rank)
    found = of_approximation(module, left, right)
    assert abs(found.error) < 1e-13
    # And of something that is no approximation at all, which none of the two is close to.
    left = torch.randn(left.shape, generator=rng).double()
    right = torch.randn(right.shape, generator=rng).double()
    assert of_approximation(module, left, right).error == pytest.approx(
        by_hand(W, left, right), rel=1e-10
    )


@pytest.mark.parametrize("case", [UNEVEN, MANY_ROWS], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_drawn_factors_in_their_own_dtype(case: object, dtype: torch.dtype, seed: int) -> None:
    module = drawn(case, seed=seed, dtype=dtype).by_module()[0]  # type: ignore[arg-type]
    left, right = (part.float() for part in best(dense(module), 4))
    found = of_approximation(module, left, right)
    assert found.error == pytest.approx(by_hand(dense(module), left, right), abs=1e-13)
    assert abs(found.error) < 1e-7


@pytest.mark.parametrize("amount", [1e-9, 1e-6, 1e-3, 0.3])
def test_a_perturbation_reads_as_what_was_put_in(amount: float, rng: torch.Generator) -> None:
    """Of an exact product, so that the error is the perturbation itself: the smallest, too."""
    module = gaussian(rng, 20, 30, (4, 3, 2))
    W = dense(module)
    left, right = best(W, 9)
    error = torch.randn(20, 30, generator=rng).double()
    error *= amount * torch.linalg.norm(W) / torch.linalg.norm(error)
    # left right + error, as a product of more columns.
    found = of_approximation(
        module, torch.cat([left, error], dim=1), torch.cat([right, torch.eye(30).double()])
    )
    assert found.error == pytest.approx(amount, rel=1e-4)


def test_a_perturbed_truncation_reads_worse_by_the_excess(rng: torch.Generator) -> None:
    """|dW - X|^2 = optimal^2 + e^2, where e turns a kept direction down and touches no other."""
    module = gaussian(rng, 20, 30, (6, 5))
    W = dense(module)
    left, right = best(W, 3)
    values = torch.linalg.svdvals(W)
    left[:, 2] *= 0.9
    optimal = float(values[3:].norm())
    expected = ((optimal**2 + (0.1 * float(values[2])) ** 2) ** 0.5 - optimal) / float(values.norm())
    assert of_approximation(module, left, right).error == pytest.approx(expected, rel=1e-9)


def test_a_forgotten_coefficient_is_seen(rng: torch.Generator) -> None:
    module = gaussian(rng, 20, 30, (4, 3, 2))
    unweighted = dense(Module(module.As, module.Bs, [1.0] * 3))
    left, right = best(unweighted, 9)
    expected = torch.linalg.norm(unweighted - dense(module)) / torch.linalg.norm(dense(module))
    assert float(expected) > 0.1
    assert of_approximation(module, left, right).error == pytest.approx(float(expected), rel=1e-10)


def test_rank_deficient_updates_and_zero_columns(rng: torch.Generator) -> None:
    """Two clients with the same factors, and one that has not moved: dW has rank 3 of R = 9."""
    A, B = torch.randn(3, 16, generator=rng).double(), torch.randn(12, 3, generator=rng).double()
    module = module_of([(A, B), (A, B), (A, torch.zeros_like(B))], [0.5, 0.25, 0.25])
    left, right = best(dense(module), 6)
    left[:, 3:] = 0  # decompositions leave zeros where there is nothing
    right[3:] = 0
    found = of_approximation(module, left, right)
    assert abs(found.error) < 1e-13
    assert found.orthogonality is not None
    assert found.orthogonality < 1e-13
    # Noise in place of the zeros is noise.
    left[:, 3:] = 1e-3
    right[3:] = torch.randn(3, 16, generator=rng).double()
    assert of_approximation(module, left, right).error == pytest.approx(
        by_hand(dense(module), left, right), rel=1e-9
    )


def test_an_update_of_zero(rng: torch.Generator) -> None:
    """Nothing to be relative to: the error is the approximation's own norm."""
    A, B = torch.randn(3, 16, generator=rng).double(), torch.zeros(12, 3).double()
    module = module_of([(A, B)], [1.0])
    zero = of_approximation(module, torch.zeros(12, 2).double(), torch.zeros(2, 16).double())
    assert (zero.error, zero.orthogonality) == (0.0, 0.0)
    left, right = torch.ones(12, 1).double(), torch.ones(1, 16).double()
    assert of_approximation(module, left, right).error == pytest.approx((12 * 16) ** 0.5)


def test_loss_of_orthogonality_is_the_largest_cosine(rng: torch.Generator) -> None:
    module = gaussian(rng, 20, 30, (4, 3, 2))
    left, right = best(dense(module), 4)
    straight = of_approximation(module, left, right).orthogonality
    assert straight is not None
    assert straight < 1e-13
    # The second direction leans towards the first by a known angle, whatever its length.
    lengths = left.norm(dim=0)
    tilted = left.clone()
    tilted[:, 1] = (
        7 * lengths[1] * (0.995 * left[:, 1] / lengths[1] + 0.0998749 * left[:, 0] / lengths[0])
    )
    assert of_approximation(module, tilted, right).orthogonality == pytest.approx(0.0998749, rel=1e-4)
    # The same on the right side, which has no lengths.
    leaning = right.clone()
    leaning[3] = 0.8 * right[3] + 0.6 * right[0]
    assert of_approximation(module, left, leaning).orthogonality == pytest.approx(0.6, rel=1e-6)


@pytest.mark.parametrize("amount", [1e-12, 1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_relative_error(amount: float, dtype: torch.dtype, rng: torch.Generator) -> None:
    """In float64 also where what was found is not: nothing of it is lost in the difference."""
    found = torch.randn(9, 7, generator=rng).to(dtype)
    error = torch.randn(9, 7, generator=rng).double()
    exact = found.double() + amount * error
    expected = amount * torch.linalg.norm(error) / torch.linalg.norm(exact)
    assert relative_error(found, exact) == pytest.approx(float(expected), rel=1e-3)


def test_relative_error_of_nothing() -> None:
    zero = torch.zeros(3, 2)
    assert relative_error(zero, zero) == 0
    assert relative_error(torch.ones(3, 2), zero) == pytest.approx(6**0.5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_small_error(wrong: float, rng: torch.Generator) -> None:
    found = torch.randn(9, 7, generator=rng)
    spoilt = found.clone()
    spoilt[3, 2] = wrong
    assert not relative_error(spoilt, found) < 1e300
