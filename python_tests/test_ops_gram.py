"""ops.gram and update_gram against float64 products, and against updates that are formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import DTYPES, product, random_stack
from torch import Tensor

from fastagg import ops

EPS = 2.0**-52


def updates(A: Tensor, Bt: Tensor, c: Tensor | None, owners: Tensor, clients: int) -> Tensor:
    """Every client's dW (L, K, m, n) in float64."""
    weights = torch.ones(A.shape[:2], dtype=torch.float64) if c is None else c.double()
    each = [product(A, Bt, weights * (owners == k)) for k in range(clients)]
    shape = (A.shape[0], 0, Bt.shape[2], A.shape[2])
    return torch.stack(each, 1) if each else torch.zeros(shape, dtype=torch.float64)


@settings(max_examples=60)
@given(
    modules=st.integers(0, 3),
    rows=st.integers(0, 30),
    m=st.integers(0, 40),
    n=st.integers(0, 40),
    a_dtype=st.sampled_from((*DTYPES, torch.float64)),
    bt_dtype=st.sampled_from((*DTYPES, torch.float64)),
    kind=st.sampled_from((None, torch.float32, torch.float64)),
    clients=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_both_ops_are_the_equation(
    modules: int,
    rows: int,
    m: int,
    n: int,
    a_dtype: torch.dtype,
    bt_dtype: torch.dtype,
    kind: torch.dtype | None,
    clients: int,
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    A, Bt = random_stack(rng, modules, rows, m, n, a_dtype, bt_dtype)
    for found, factor in zip(ops.gram(A, Bt), (A.double(), Bt.double()), strict=True):
        assert found.dtype == torch.float64
        assert torch.equal(found, found.mT), "symmetric to the bit"
        norms = factor.norm(dim=2)
        allowed = 4 * (factor.shape[2] + 1) * EPS * norms[:, :, None] * norms[:, None]
        assert ((found - factor @ factor.mT).abs() <= allowed).all()

    c = None if kind is None else torch.randn(modules, rows, generator=rng).to(kind)
    owners = torch.randint(-1, max(clients, 1), (modules, rows), generator=rng)
    owners = owners.clamp(max=clients - 1)
    found = ops.update_gram(A, Bt, c, owners, clients=clients)
    dW = updates(A, Bt, c, owners, clients).flatten(2)
    norms = dW.norm(dim=2)
    # What is summed are the rows' terms, whose norm is the scale of the rounding.
    terms = product(A.abs(), Bt.abs(), None if c is None else c.abs()).flatten(1).norm(dim=1)
    torch.testing.assert_close(found, found.mT, rtol=0, atol=0)
    allowed = 1e-13 * norms[:, :, None] * norms[:, None] + 100 * EPS * terms[:, None, None] ** 2
    assert ((found - dW @ dW.mT).abs() <= allowed).all()


@pytest.mark.parametrize("rows", [191, 192, 193, 400])
def test_more_rows_than_a_tile(rows: int, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 2, rows, 70, 530, torch.bfloat16, torch.float32)
    for found, factor in zip(ops.gram(A, Bt), (A.double(), Bt.double()), strict=True):
        assert torch.equal(found, found.mT)
        torch.testing.assert_close(found, factor @ factor.mT, rtol=0, atol=1e-11)
    owners = torch.randint(-1, 7, (2, rows), generator=rng)
    c = torch.rand(2, rows, generator=rng)
    dW = updates(A, Bt, c, owners, 7).flatten(2)
    expected = dW @ dW.mT
    found = ops.update_gram(A, Bt, c, owners, clients=7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_clients_that_cancel_or_repeat_each_other(rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 6, 20, 30)
    A3, Bt3 = A.repeat(1, 3, 1), torch.cat([Bt, -Bt, Bt], 1)
    owners = torch.arange(3).repeat_interleave(6)[None]
    gram = ops.update_gram(A3, Bt3, None, owners, clients=3)[0]
    norm2 = product(A, Bt).square().sum()
    expected = norm2 * torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]]).double()
    torch.testing.assert_close(gram, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1e20, 1e-22, 1e-38])
def test_squares_beyond_float32(scale: float, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 5, 20, 30)
    A = A * scale
    for found, factor in zip(ops.gram(A, Bt), (A.double(), Bt.double()), strict=True):
        torch.testing.assert_close(found, factor @ factor.mT, rtol=1e-12, atol=1e-13 * scale**2)
    owners = torch.zeros(1, 5, dtype=torch.int64)
    norm2 = ops.update_gram(A, Bt, None, owners, clients=1)
    torch.testing.assert_close(norm2.flatten(), product(A, Bt).square().sum()[None])


def test_any_layout_and_the_bits_of_a_module_alone(rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 4, 50, 33, 1030)
    c, owners = torch.rand(4, 50, generator=rng), torch.randint(-1, 3, (4, 50), generator=rng)
    expected = (*ops.gram(A, Bt), ops.update_gram(A, Bt, c, owners, clients=3))
    a, bt = A.mT.contiguous().mT, torch.stack([Bt, Bt], -1)[..., 0]
    owned = owners.t().contiguous().t()
    found = (*ops.gram(a, bt), ops.update_gram(a, bt, c.t().contiguous().t(), owned, clients=3))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    for module in range(4):
        one = slice(module, module + 1)
        alone = (
            *ops.gram(A[one], Bt[one]),
            ops.update_gram(A[one], Bt[one], c[one], owners[one], clients=3),
        )
        assert all(torch.equal(x, y[one]) for x, y in zip(alone, expected, strict=True))


def test_a_non_finite_row_is_seen_in_its_own_client_only(rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 4, 20, 30)
    A[0, 1, 3] = torch.nan
    gram = ops.update_gram(A, Bt, None, torch.tensor([[0, 1, 2, -1]]), clients=3)[0]
    bad = torch.zeros(3, 3, dtype=torch.bool)
    bad[1] = bad[:, 1] = True
    assert torch.equal(gram.isnan(), bad)


A, BT, OWNERS = (2, 5, 7), (2, 5, 9), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"A": torch.zeros(5, 7)}, ["'A'", "three dimensions", "(5, 7)"]),
        ({"A": torch.zeros(A).to(torch.int8)}, ["'A'", "Double", "Char"]),
        ({"Bt": torch.zeros(2, 6, 9)}, ["'Bt'", "(2, 5, 7)", "(2, 6, 9)"]),
        ({"c": torch.zeros(2, 6)}, ["'coefficients'", "(2, 5)", "(2, 6)"]),
        ({"c": torch.zeros(2, 5, dtype=torch.int64)}, ["'coefficients'", "Double", "Long"]),
        ({"owners": OWNERS.int()}, ["'owners'", "Long", "Int"]),
        ({"owners": OWNERS[:1]}, ["'owners'", "(2, 5)", "(1, 5)"]),
        ({"owners": OWNERS + 3}, ["'owners'", "below 3", "got 3"]),
        ({"owners": OWNERS - 2}, ["'owners'", "-1 for a row of nobody", "got -2"]),
        ({"clients": -1}, ["'clients'", "at least 0", "-1"]),
        ({"clients": 2**40}, ["'clients'", "2^63"]),
    ],
)
def test_argument_errors(arguments: dict[str, Any], words: list[str]) -> None:
    call = {"A": torch.ones(A), "Bt": torch.ones(BT), "c": None, "owners": OWNERS, "clients": 3}
    call.update(arguments)
    with pytest.raises(RuntimeError, match=r"fastagg::update_gram: argument") as caught:
        ops.update_gram(
            call["A"], call["Bt"], call["c"], call["owners"], clients=call["clients"]
        )
    assert all(word in str(caught.value) for word in words)
    if {"A", "Bt"} & set(arguments):
        with pytest.raises(RuntimeError, match=r"fastagg::gram: argument"):
            ops.gram(call["A"], call["Bt"])
