"""fastagg.stack and fastagg.reconstruct: one module's factors, without a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import DTYPES, integer, normal
from torch import Tensor

import fastagg


def random_factors(
    rng: torch.Generator, ranks: list[int], m: int, n: int
) -> tuple[list[Tensor], list[Tensor]]:
    pick = [DTYPES[integer(rng, 0, 2)] for _ in range(2 * len(ranks))]
    As = [normal(rng, r, n, dtype=pick[2 * k]) for k, r in enumerate(ranks)]
    Bs = [normal(rng, m, r, dtype=pick[2 * k + 1]) for k, r in enumerate(ranks)]
    return As, Bs


def equation(As: list[Tensor], Bs: list[Tensor], weights: list[float]) -> Tensor:
    """sum_k w_k B_k A_k in float64."""
    terms = [w * (B.double() @ A.double()) for A, B, w in zip(As, Bs, weights, strict=True)]
    return torch.stack(terms).sum(0)


@settings(max_examples=60)
@given(
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    m=st.integers(0, 25),
    n=st.integers(0, 25),
    weighted=st.booleans(),
    scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_both_are_the_equation(
    ranks: list[int], m: int, n: int, weighted: bool, scaled: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    As, Bs = random_factors(rng, ranks, m, n)
    w = torch.rand(len(ranks), generator=rng).tolist() if weighted else None
    s = torch.randn(len(ranks), generator=rng).tolist() if scaled else None
    product = [(w[k] if w else 1.0) * (s[k] if s else 1.0) for k in range(len(ranks))]
    expected = equation(As, Bs, product)
    allowed = 1e-5 * (1 + float(expected.abs().max()) if expected.numel() else 1)

    A, B = fastagg.stack(As, Bs, weights=w, scalings=s)
    assert (A.shape, B.shape) == ((sum(ranks), n), (m, sum(ranks)))
    assert A.dtype == B.dtype == torch.float32
    assert A.is_contiguous()
    assert B.is_contiguous()
    torch.testing.assert_close(B.double() @ A.double(), expected, rtol=0, atol=allowed)
    assert torch.equal(B, torch.cat([b.float() for b in Bs], 1)), "B is handed on as it is"

    dW = fastagg.reconstruct(As, Bs, weights=w, scalings=s)
    torch.testing.assert_close(dW.double(), expected, rtol=0, atol=allowed)
    base = normal(rng, m, n)
    total = base.double() + expected
    returned = fastagg.reconstruct(As, Bs, weights=w, scalings=s, base=base)
    assert returned is base
    torch.testing.assert_close(base.double(), total, rtol=0, atol=allowed + 1e-6)


def test_the_stack_in_order_and_unscaled_to_the_bit(rng: torch.Generator) -> None:
    As, Bs = random_factors(rng, [3, 1, 8], 6, 5)
    A, B = fastagg.stack(As, Bs)
    assert torch.equal(A, torch.cat([a.float() for a in As]))
    assert torch.equal(B, torch.cat([b.float() for b in Bs], 1))
    A, B = fastagg.stack(As, Bs, weights=[0.5, 0.25, 2], dtype=torch.bfloat16)
    scaled = [a.float() * w for a, w in zip(As, (0.5, 0.25, 2), strict=True)]
    assert torch.equal(A, torch.cat(scaled).bfloat16())
    assert torch.equal(B, torch.cat([b.float() for b in Bs], 1).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_of_any_dtype_and_layout(dtype: torch.dtype, rng: torch.Generator) -> None:
    As, Bs = random_factors(rng, [2, 3], 12, 10)
    big = normal(rng, 10, 30, dtype=dtype)
    base = big[:, 3:27:2].mT
    untouched = torch.cat([big[:, :3], big[:, 4:27:2], big[:, 27:]], 1)
    total = base.double() + equation(As, Bs, [0.3, 0.7])
    with torch.no_grad():
        fastagg.reconstruct(As, Bs, weights=[0.3, 0.7], base=base)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(base.double(), total, rtol=rounding, atol=1e-5)
    assert torch.equal(untouched, torch.cat([big[:, :3], big[:, 4:27:2], big[:, 27:]], 1))
    found = fastagg.reconstruct(As, Bs, dtype=dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), equation(As, Bs, [1, 1]), rtol=rounding, atol=1e-5
    )


def test_parameters_and_strided_factors(rng: torch.Generator) -> None:
    """A model's own LoRA parameters, and views of them, are taken as they are."""
    As, Bs = [normal(rng, 4, 10)], [normal(rng, 12, 4)]
    expected = fastagg.stack(As, Bs), fastagg.reconstruct(As, Bs)
    learnt = [torch.nn.Parameter(As[0])], [torch.nn.Parameter(Bs[0])]
    strided = [As[0].mT.contiguous().mT], [torch.stack([Bs[0]] * 2, -1)[..., 0]]
    for pair in (learnt, strided):
        A, B = fastagg.stack(*pair)
        dW = fastagg.reconstruct(*pair)
        assert torch.equal(A, expected[0][0])
        assert torch.equal(B, expected[0][1])
        assert torch.equal(dW, expected[1])
        assert not (A.requires_grad or B.requires_grad or dW.requires_grad)


def test_a_base_that_learns_is_changed_under_no_grad_only(rng: torch.Generator) -> None:
    As, Bs = [normal(rng, 4, 10)], [normal(rng, 12, 4)]
    base = torch.nn.Parameter(torch.zeros(12, 10))
    with pytest.raises(ValueError, match=r"base requires a gradient: .*torch.no_grad"):
        fastagg.reconstruct(As, Bs, base=base)
    assert not base.any()
    with torch.no_grad():
        assert fastagg.reconstruct(As, Bs, base=base) is base
    torch.testing.assert_close(base.detach().double(), equation(As, Bs, [1]), rtol=0, atol=1e-5)


def test_weights_of_many_kinds(rng: torch.Generator) -> None:
    As, Bs = random_factors(rng, [2, 3], 6, 5)
    expected = fastagg.reconstruct(As, Bs, weights=[3.0, 5.0])
    for weights in ((3, 5), torch.tensor([3, 5]), torch.tensor([3.0, 5.0]).bfloat16()):
        assert torch.equal(fastagg.reconstruct(As, Bs, weights=weights), expected)
    assert not fastagg.reconstruct(As, Bs, weights=[0, 0]).any()


ONES = torch.ones


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"As": [], "Bs": []}, "as many A as B and at least one, got 0 and 0"),
        ({"Bs": [ONES(6, 2)]}, "as many A as B and at least one, got 2 and 1"),
        ({"As": [ONES(2, 5), ONES(3, 4)]}, r"client 1: expected A \(r, 5\).*got \(3, 4\)"),
        ({"Bs": [ONES(6, 2), ONES(6, 2)]}, r"client 1: .*got \(3, 5\) and \(6, 2\)"),
        ({"Bs": [ONES(6, 2), ONES(7, 3)]}, r"client 1: .*B \(6, r\).*\(7, 3\)"),
        ({"As": [ONES(5), ONES(3, 5)]}, r"client 0: expected A \(r, n\).*got \(5,\)"),
        ({"Bs": [torch.tensor(1.0), ONES(6, 3)]}, r"client 0: expected A \(r, n\).*got .*\(\)"),
        ({"As": [ONES(2, 5), ONES(3, 5).double()]}, "client 1, A: .*float64; cast it first"),
        ({"Bs": [ONES(6, 2).int(), ONES(6, 3)]}, "client 0, B: .*int32; cast it first"),
        ({"Bs": [ONES(6, 2), ONES(6, 3, device="meta")]}, "client 1, B: expected cpu, got meta"),
        ({"weights": [1.0]}, r"weights: expected 2 numbers, got shape \(1,\)"),
        ({"weights": [1.0, float("nan")]}, "weights: expected finite numbers, got .*nan"),
        ({"scalings": [1.0, float("inf")]}, "scalings: expected finite numbers, got .*inf"),
        ({"scalings": [[1.0, 2.0]]}, r"scalings: expected 2 numbers, got shape \(1, 2\)"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"As": [ONES(2, 5), ONES(3, 5)], "Bs": [ONES(6, 2), ONES(6, 3)], **change}
    As, Bs = call.pop("As"), call.pop("Bs")
    with pytest.raises(ValueError, match=message):
        fastagg.stack(As, Bs, **call)
    base = torch.zeros(6, 5)
    with pytest.raises(ValueError, match=message):
        fastagg.reconstruct(As, Bs, base=base, **call)
    assert not base.any(), "a refused call writes nothing"


def test_a_base_of_another_shape_or_dtype() -> None:
    with pytest.raises(ValueError, match=r"base: expected float32, .*got torch.float64 on cpu"):
        fastagg.reconstruct([ONES(2, 5)], [ONES(6, 2)], base=torch.zeros(6, 5).double())
    with pytest.raises(ValueError, match=r"base: expected shape \(6, 5\), got \(5, 6\)"):
        fastagg.reconstruct([ONES(2, 5)], [ONES(6, 2)], base=torch.zeros(5, 6))
