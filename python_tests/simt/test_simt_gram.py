"""The CUDA gram, update_gram and squared_norm against float64, and against updates that are formed."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt.build import CSRC, SHIM, address, in_every_order, load
from stacks import CODES, product, random_stack
from torch import Tensor

DTYPES = {**CODES, torch.float64: 3}
EPS = 2.0**-52


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    kernels = [CSRC / "cuda" / "products.cu", CSRC / "cuda" / "gram.cu"]
    return load("gram", [*kernels, SHIM / "gram_exports.cpp"])


def stack_arguments(A: Tensor, Bt: Tensor, c: Tensor | None) -> list[object]:
    modules, rows, n = A.shape
    factors = [address(A), ctypes.c_int64(DTYPES[A.dtype])]
    factors += [address(Bt), ctypes.c_int64(DTYPES[Bt.dtype])]
    sizes = (modules, rows, n, Bt.shape[2])
    return [*factors, *map(ctypes.c_int64, sizes), address(c)]


def gram(library: ctypes.CDLL, A: Tensor) -> Tensor:
    modules, rows, _ = A.shape
    out = torch.full((modules, rows, rows), torch.nan, dtype=torch.float64)
    sizes = map(ctypes.c_int64, A.shape)
    library.gram_f64(address(A), ctypes.c_int64(DTYPES[A.dtype]), *sizes, address(out))
    return out


def update_gram(
    library: ctypes.CDLL, A: Tensor, Bt: Tensor, c: Tensor | None, owners: Tensor, clients: int
) -> Tensor:
    out = torch.full((A.shape[0], clients, clients), torch.nan, dtype=torch.float64)
    arguments = stack_arguments(A, Bt, c)
    library.update_gram_f64(*arguments, address(owners), ctypes.c_int64(clients), address(out))
    return out


def squared_norm(library: ctypes.CDLL, A: Tensor, Bt: Tensor, c: Tensor | None) -> Tensor:
    out = torch.full((A.shape[0],), torch.nan, dtype=torch.float64)
    library.squared_norm_f64(*stack_arguments(A, Bt, c), address(out))
    return out


def updates(A: Tensor, Bt: Tensor, c: Tensor | None, owners: Tensor, clients: int) -> Tensor:
    """Every client's dW (L, K, m n) in float64."""
    weights = torch.ones(A.shape[:2], dtype=torch.float64) if c is None else c
    each = [product(A, Bt, weights * (owners == k)) for k in range(clients)]
    if not each:
        return torch.zeros(A.shape[0], 0, A.shape[2] * Bt.shape[2], dtype=torch.float64)
    return torch.stack(each, 1).flatten(2)


def assert_are_the_equations(
    A: Tensor,
    Bt: Tensor,
    c: Tensor | None,
    owners: Tensor,
    inner: Tensor,
    norm2: Tensor,
) -> None:
    assert torch.equal(inner, inner.mT), "symmetric to the bit"
    # What is summed are the rows' terms, whose norm is the scale of the rounding.
    terms = product(A.abs(), Bt.abs(), None if c is None else c.abs()).flatten(1).norm(dim=1)
    rounding = 100 * EPS * terms**2
    dW = updates(A, Bt, c, owners, inner.shape[1])
    norms = dW.norm(dim=2)
    allowed = 1e-13 * norms[:, :, None] * norms[:, None] + rounding[:, None, None]
    assert ((inner - dW @ dW.mT).abs() <= allowed).all()
    expected = product(A, Bt, c).flatten(1).square().sum(1)
    assert ((norm2 - expected).abs() <= 1e-13 * expected + rounding).all()


@settings(max_examples=40)
@given(
    modules=st.integers(0, 3),
    rows=st.one_of(st.integers(0, 12), st.sampled_from((31, 32, 33, 63, 64, 65, 130))),
    m=st.integers(0, 20),
    n=st.integers(0, 20),
    a_dtype=st.sampled_from(tuple(DTYPES)),
    bt_dtype=st.sampled_from(tuple(DTYPES)),
    weighted=st.booleans(),
    clients=st.one_of(st.integers(0, 5), st.sampled_from((16, 17, 33, 70))),
    seed=st.integers(0, 2**31),
)
def test_all_are_their_equations(
    library: ctypes.CDLL,
    modules: int,
    rows: int,
    m: int,
    n: int,
    a_dtype: torch.dtype,
    bt_dtype: torch.dtype,
    weighted: bool,
    clients: int,
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    A, Bt = random_stack(rng, modules, rows, m, n, a_dtype, bt_dtype)
    for factor in (A, Bt):
        found, values = gram(library, factor), factor.double()
        assert torch.equal(found, found.mT)
        norms = values.norm(dim=2)
        allowed = 4 * (factor.shape[2] + 1) * EPS * norms[:, :, None] * norms[:, None]
        assert ((found - values @ values.mT).abs() <= allowed).all()
    c = torch.randn(modules, rows, generator=rng, dtype=torch.float64) if weighted else None
    owners = torch.randint(-1, clients + 1, (modules, rows), generator=rng)
    inner = update_gram(library, A, Bt, c, owners, clients)
    assert_are_the_equations(A, Bt, c, owners, inner, squared_norm(library, A, Bt, c))


def test_the_order_of_threads_is_not_seen(library: ctypes.CDLL, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 2, 97, 20, 35, torch.bfloat16, torch.float32)
    c = torch.randn(2, 97, generator=rng, dtype=torch.float64)
    owners = torch.randint(-1, 41, (2, 97), generator=rng)

    def run() -> tuple[Tensor, ...]:
        inner = update_gram(library, A, Bt, c, owners, 40)
        return inner, squared_norm(library, A, Bt, c), gram(library, A)

    inner, norm2, _ = in_every_order(library, run)
    assert_are_the_equations(A, Bt, c, owners, inner, norm2)


@pytest.mark.parametrize(("modules", "rows"), [(1, 1090), (5, 420)])
def test_strips_and_modules_come_in_several_turns(
    library: ctypes.CDLL, modules: int, rows: int, rng: torch.Generator
) -> None:
    """More tiles than memory is taken for; and the bits of a module are those it has alone."""
    A, Bt = random_stack(rng, modules, rows, 3, 5)
    c = torch.rand(modules, rows, generator=rng, dtype=torch.float64)
    owners = torch.randint(-1, 3, (modules, rows), generator=rng)
    inner, norm2 = update_gram(library, A, Bt, c, owners, 3), squared_norm(library, A, Bt, c)
    assert_are_the_equations(A, Bt, c, owners, inner, norm2)
    if modules > 1:
        for module in (0, 4):
            one = slice(module, module + 1)
            alone = update_gram(library, A[one], Bt[one], c[one], owners[one], 3)
            assert torch.equal(alone, inner[one])
            assert torch.equal(squared_norm(library, A[one], Bt[one], c[one]), norm2[one])


def test_clients_that_cancel_or_repeat_each_other(library: ctypes.CDLL, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 6, 20, 30)
    A3, Bt3 = A.repeat(1, 3, 1), torch.cat([Bt, -Bt, Bt], 1)
    owners = torch.arange(3).repeat_interleave(6)[None]
    inner = update_gram(library, A3, Bt3, None, owners, 3)[0]
    norm2 = product(A, Bt).square().sum()
    expected = norm2 * torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]]).double()
    torch.testing.assert_close(inner, expected, rtol=1e-13, atol=0)
    nothing = squared_norm(library, A3[:, :12], Bt3[:, :12], None)
    assert 0 <= float(nothing) <= 1e-13 * float(norm2)


@pytest.mark.parametrize("scale", [1e20, 1e-22, 1e-38])
def test_squares_beyond_float32(library: ctypes.CDLL, scale: float, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 5, 20, 30)
    A = A * scale
    expected = A.double() @ A.double().mT
    torch.testing.assert_close(gram(library, A), expected, rtol=1e-12, atol=1e-13 * scale**2)
    expected = product(A, Bt).square().sum()[None]
    torch.testing.assert_close(squared_norm(library, A, Bt, None), expected)
    owners = torch.zeros(1, 5, dtype=torch.int64)
    torch.testing.assert_close(update_gram(library, A, Bt, None, owners, 1).flatten(), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_row_is_seen_in_its_own_client_only(
    library: ctypes.CDLL, bad: float, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, 2, 70, 20, 30)
    A[0, 1, 3], A[0, 69, 0] = bad, bad
    owners = torch.zeros(2, 70, dtype=torch.int64)
    owners[:, 1], owners[:, 2], owners[:, 69] = 1, 2, -1
    inner = update_gram(library, A, Bt, None, owners, 3)
    expected = torch.zeros(2, 3, 3, dtype=torch.bool)
    expected[0, 1] = expected[0, :, 1] = True
    assert torch.equal(~inner.isfinite(), expected)
    assert squared_norm(library, A, Bt, None).isfinite().tolist() == [False, True]
    A[0, 1, 3] = torch.nan
    assert squared_norm(library, A, Bt, None).isnan().tolist() == [True, False]


def test_owners_far_outside_are_nobody(library: ctypes.CDLL, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 6, 9, 8)
    owners = torch.tensor([[0, 2, -(2**40), 2**40, 2**63 - 1, -(2**63)]])
    found = update_gram(library, A, Bt, None, owners, 2)
    dW = updates(A, Bt, None, owners, 2)
    torch.testing.assert_close(found, dW @ dW.mT, rtol=1e-13, atol=0)
