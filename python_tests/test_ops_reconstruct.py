"""ops.reconstruct and reconstruct_ against dW = sum_r c_r Bt_r^T A_r in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import DTYPES, normal, product, random_stack
from torch import Tensor

from fastagg import ops

COEFFICIENTS = (None, torch.float32, torch.float64)


def tolerance(A: Tensor, Bt: Tensor, c: Tensor | None, dtype: torch.dtype, value: Tensor) -> Tensor:
    """The terms of each entry, rounded at each of R fp32 additions, and the result once."""
    weights = None if c is None else c.abs()
    terms = product(A.abs(), Bt.abs(), weights)
    result = torch.finfo(dtype)
    return (A.shape[1] + 2) * 2.0**-24 * terms + result.eps / 2 * value.abs() + result.tiny


def check(found: Tensor, expected: Tensor, allowed: Tensor) -> None:
    excess = (found.double() - expected).abs() - allowed
    assert not excess.numel() or float(excess.max()) <= 0


def coefficients_of(rng: torch.Generator, kind: torch.dtype | None, *shape: int) -> Tensor | None:
    return None if kind is None else torch.randn(*shape, generator=rng, dtype=torch.float64).to(kind)


@settings(max_examples=80)
@given(
    modules=st.integers(0, 3),
    rows=st.integers(0, 40),
    m=st.integers(0, 30),
    n=st.integers(0, 30),
    a_dtype=st.sampled_from(DTYPES),
    bt_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(COEFFICIENTS),
    seed=st.integers(0, 2**31),
)
def test_both_ops_are_the_equation(
    modules: int,
    rows: int,
    m: int,
    n: int,
    a_dtype: torch.dtype,
    bt_dtype: torch.dtype,
    dtype: torch.dtype,
    kind: torch.dtype | None,
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    A, Bt = random_stack(rng, modules, rows, m, n, a_dtype, bt_dtype)
    c = coefficients_of(rng, kind, modules, rows)
    expected = product(A, Bt, c)
    found = ops.reconstruct(A, Bt, c, dtype=dtype)
    assert found.dtype == dtype
    assert found.shape == (modules, m, n)
    check(found, expected, tolerance(A, Bt, c, dtype, expected))

    base = normal(rng, modules, m, n, dtype=dtype)
    total = base.double() + expected
    ops.reconstruct_(base, A, Bt, c)
    check(base, total, tolerance(A, Bt, c, dtype, total) + 2.0**-23 * total.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "rows"), [(513, 700, 33), (1025, 129, 260)])
def test_sizes_beyond_the_kernel_s_blocks(
    m: int, n: int, rows: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, 2, rows, m, n, torch.bfloat16)
    c = coefficients_of(rng, torch.float64, 2, rows)
    expected = product(A, Bt, c)
    found = ops.reconstruct(A, Bt, c, dtype=dtype)
    check(found, expected, tolerance(A, Bt, c, dtype, expected))
    base = normal(rng, 2, m, n, dtype=dtype)
    total = base.double() + expected
    # A base counts as one term more: BLAS may add it before the others.
    terms = tolerance(A, Bt, c, dtype, total) + (rows + 2) * 2.0**-24 * base.double().abs()
    ops.reconstruct_(base, A, Bt, c)
    check(base, total, terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_leave_a_base_as_it_is(dtype: torch.dtype, rng: torch.Generator) -> None:
    """NaNs and infinities too, and a tiny value that a product with one might flush."""
    base = normal(rng, 2, 300, 5, dtype=dtype)
    base[0, 0, :3] = torch.tensor([torch.nan, torch.inf, torch.finfo(dtype).smallest_normal / 2])
    before = base.clone()
    ops.reconstruct_(base, torch.ones(2, 0, 5), torch.ones(2, 0, 300))
    assert torch.equal(base.view(-1)[1:], before.view(-1)[1:])
    assert base[0, 0, 0].isnan()


def views() -> list[Any]:
    """How a base weight of (L, m, n) may lie in a larger tensor."""
    return [
        pytest.param((2, 30, 20), lambda big: big, id="contiguous"),
        pytest.param((2, 20, 30), lambda big: big.mT, id="transposed"),
        pytest.param((30, 2, 20), lambda big: big.transpose(0, 1), id="modules inside"),
        pytest.param((2, 33, 27), lambda big: big[:, 2:32, 5:25], id="sliced"),
        pytest.param((2, 60, 40), lambda big: big[:, ::2, 1::2], id="stepped"),
        pytest.param((2, 30, 40), lambda big: big.unflatten(2, (20, 2))[..., 1], id="interleaved"),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "view"), views())
def test_a_base_that_is_a_view(
    shape: tuple[int, ...], view: Any, dtype: torch.dtype, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, 2, 9, 30, 20)
    big = normal(rng, *shape, dtype=dtype)
    before = big.clone()
    base = view(big)
    total = base.double() + product(A, Bt)
    ops.reconstruct_(base, A, Bt)
    check(base, total, tolerance(A, Bt, None, dtype, total) + 2.0**-23 * total.abs())
    view(before).copy_(base)
    assert torch.equal(big, before), "what lies around the view must stay"


def test_any_layout_of_the_factors(rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 3, 8, 12, 10)
    c = torch.randn(3, 8, generator=rng)
    expected = ops.reconstruct(A, Bt, c)
    for change in (
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        strided = [change(t) for t in (A, Bt)]
        assert not strided[0].is_contiguous()
        # A skinny copy may meet BLAS at another address, hence in another order of additions.
        torch.testing.assert_close(ops.reconstruct(*strided, torch.stack([c, c], -1)[..., 0]), expected)
    shared = A[:1].expand(3, 8, 10)
    torch.testing.assert_close(ops.reconstruct(shared, Bt), ops.reconstruct(shared.contiguous(), Bt))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bf16_sums_are_rounded_once(dtype: torch.dtype) -> None:
    """256 ones and 2^-8 on top of 256: additions in bf16 would all be lost."""
    A, Bt = torch.ones(1, 256, 1, dtype=dtype), torch.ones(1, 256, 1, dtype=dtype)
    c = torch.full((1, 256), 2.0**-7)
    base = torch.full((1, 1, 1), 256.0, dtype=dtype)
    ops.reconstruct_(base, A, Bt, c)
    assert float(base) == 258.0


def test_overflow_of_a_half_is_infinite() -> None:
    A, Bt = torch.full((1, 2, 3), 300.0), torch.full((1, 2, 4), 300.0)
    assert torch.isinf(ops.reconstruct(A, Bt, dtype=torch.float16)).all()
    assert torch.equal(ops.reconstruct(A, Bt), torch.full((1, 4, 3), 180000.0))


def test_a_module_has_the_same_bits_alone_and_in_a_bucket(rng: torch.Generator) -> None:
    """Rows of 77 floats put each module of a slab at another alignment."""
    for dtype in DTYPES:
        A, Bt = random_stack(rng, 5, 37, 530, 77, dtype)
        c = torch.randn(5, 37, generator=rng)
        together = ops.reconstruct(A, Bt, c)
        for module in range(5):
            one = slice(module, module + 1)
            assert torch.equal(ops.reconstruct(A[one], Bt[one], c[one]), together[one])


@pytest.mark.parametrize("route", ["kernel", "library"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 21, 30, 19), (1, 0, 5, 7), (0, 3, 5, 7), (3, 4, 0, 9)])
def test_every_route_is_the_equation(
    shape: tuple[int, int, int, int], dtype: torch.dtype, route: str, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, *shape, dtype)
    expected = product(A, Bt)
    found = ops.reconstruct(A, Bt, dtype=dtype, route=route)
    check(found, expected, tolerance(A, Bt, None, dtype, expected))
    base = normal(rng, *expected.shape, dtype=dtype)
    total = base.double() + expected
    ops.reconstruct_(base, A, Bt, route=route)
    check(base, total, tolerance(A, Bt, None, dtype, total) + 2.0**-23 * total.abs())


A, BT = (2, 5, 7), (2, 5, 9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"A": torch.zeros(5, 7)}, ["'A'", "three dimensions", "(5, 7)"]),
        ({"A": torch.zeros(A, dtype=torch.float64)}, ["'A'", "Half", "Double"]),
        ({"Bt": torch.zeros(BT, dtype=torch.int32)}, ["'Bt'", "Half", "Int"]),
        ({"Bt": torch.zeros(2, 4, 9)}, ["'Bt'", "(2, 5, 7)", "(2, 4, 9)"]),
        ({"Bt": torch.zeros(3, 5, 9)}, ["'Bt'", "(2, 5, 7)", "(3, 5, 9)"]),
        ({"c": torch.zeros(2, 4)}, ["'coefficients'", "(2, 5)", "(2, 4)"]),
        ({"c": torch.zeros(10)}, ["'coefficients'", "(2, 5)", "(10)"]),
        ({"c": torch.zeros(2, 5).half()}, ["'coefficients'", "Double", "Half"]),
        ({"base": torch.zeros(2, 7, 9)}, ["'base'", "(2, 9, 7)", "(2, 7, 9)"]),
        ({"base": torch.zeros(2, 9, 7).double()}, ["'base'", "Half", "Double"]),
        ({"base": torch.zeros(9, 7).expand(2, 9, 7)}, ["'base'", "expanded", "clone"]),
        ({"dtype": torch.float64}, ["'dtype'", "Half", "Double"]),
    ],
)
def test_argument_errors(arguments: dict[str, Any], words: list[str]) -> None:
    given = {"A": torch.ones(A), "Bt": torch.ones(BT), "c": None, **arguments}
    base = given.get("base", torch.zeros(2, 9, 7))
    before = base.clone()
    if "dtype" not in arguments:
        with pytest.raises(RuntimeError, match=r"fastagg::reconstruct_: argument") as caught:
            ops.reconstruct_(base, given["A"], given["Bt"], given["c"])
        assert all(word in str(caught.value) for word in words)
        assert torch.equal(base, before)
    if "base" not in arguments:
        with pytest.raises(RuntimeError, match=r"fastagg::reconstruct: argument") as caught:
            ops.reconstruct(
                given["A"], given["Bt"], given["c"], dtype=given.get("dtype", torch.float32)
            )
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"c": torch.ones(2, 5)}, ["'route'", "no coefficients", "got coefficients"]),
        ({"A": torch.ones(2, 5, 7).half()}, ["'route'", "one dtype", "Half, Float and Float"]),
        ({"Bt": torch.ones(2, 5, 9).bfloat16()}, ["'route'", "Float, BFloat16 and Float"]),
    ],
)
def test_what_the_library_cannot_is_refused(
    arguments: dict[str, Tensor], words: list[str]
) -> None:
    call = {"A": torch.ones(2, 5, 7), "Bt": torch.ones(2, 5, 9), "c": None, **arguments}
    base = torch.zeros(2, 9, 7)
    for attempt in (
        lambda: ops.reconstruct(call["A"], call["Bt"], call["c"], route="library"),
        lambda: ops.reconstruct_(base, call["A"], call["Bt"], call["c"], route="library"),
    ):
        with pytest.raises(RuntimeError, match=r"fastagg::reconstruct_?: argument") as caught:
            attempt()
        assert all(word in str(caught.value) for word in words)
    assert not base.any()


def test_a_route_that_there_is_not() -> None:
    with pytest.raises(RuntimeError, match=r"'route': expected 0 .*, 1 .* or 2 .*, got 3"):
        torch.ops.fastagg.reconstruct(torch.ones(A), torch.ones(BT), None, torch.float32, 3)
    with pytest.raises(RuntimeError, match=r"fastagg::reconstruct_: argument 'route'.*got -1"):
        torch.ops.fastagg.reconstruct_(
            torch.ones(2, 9, 7), torch.ones(A), torch.ones(BT), None, -1
        )
