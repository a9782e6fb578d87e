"""The CUDA kernel of reconstruct and reconstruct_, on the CPU, against the equation in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt.build import CSRC, SHIM, address, in_every_order, load
from stacks import CODES, DTYPES, normal, product, random_stack
from torch import Tensor

SIZES = st.one_of(st.integers(0, 9), st.sampled_from((16, 31, 64, 127, 128, 129, 136)))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load("reconstruct", [CSRC / "cuda" / "reconstruct.cu", SHIM / "reconstruct_exports.cpp"])


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """The same values `offset` elements into a buffer of their own."""
    buffer = torch.zeros(offset + tensor.numel(), dtype=tensor.dtype)
    return buffer[offset:].view(tensor.shape).copy_(tensor)


def reconstruct(
    library: ctypes.CDLL, base: Tensor, A: Tensor, Bt: Tensor, c: Tensor | None, *, replace: bool = False
) -> Tensor:
    """W = (W +) dW in place; c is what the kernel gets, float64."""
    slabs = [(address(x), ctypes.c_int64(CODES[x.dtype])) for x in (A, Bt)]
    sizes = (A.shape[0], A.shape[1], Bt.shape[2], A.shape[2])
    library.simt_reconstruct(
        *slabs[0],
        *slabs[1],
        address(c),
        *(ctypes.c_int64(size) for size in sizes),
        address(base),
        ctypes.c_int64(CODES[base.dtype]),
        ctypes.c_bool(replace),
    )
    return base


def pairs_of(*dtypes: torch.dtype) -> int:
    """Pairs of terms in a step, at most."""
    terms = [3 if dtype is torch.float32 else 2 if dtype is torch.float16 else 1 for dtype in dtypes]
    return sum(i + j < 3 for i in range(terms[0]) for j in range(terms[1]))


def tolerance(A: Tensor, Bt: Tensor, c: Tensor | None, dtype: torch.dtype, value: Tensor) -> Tensor:
    """Of sum |c b a|, in units of 2^-24: pairs of terms left out 2; c b rounded, and c, 2; for every
    sixteen rows a change of sigma, 2, and for each pair of terms an addition cut off, 2. The result is
    rounded once."""
    terms = product(A.abs(), Bt.abs(), None if c is None else c.abs())
    steps = -(-A.shape[1] // 16)
    pairs = pairs_of(A.dtype, Bt.dtype if c is None else torch.float32)
    units = 2 + (4 + 2 * steps) * (c is not None) + 2 * pairs * steps
    result = torch.finfo(dtype)
    return units * 2.0**-24 * terms + result.eps / 2 * value.abs() + result.tiny


def check(found: Tensor, expected: Tensor, allowed: Tensor) -> None:
    excess = (found.double() - expected).abs() - allowed
    assert not excess.numel() or float(excess.max()) <= 0


def piecewise(rng: torch.Generator, modules: int, rows: int) -> Tensor:
    """Ten clients of FLoRA's ranks, a coefficient each."""
    ranks = torch.tensor([64, 32, 16, 16, 8, 8, 4, 4, 4, 4])
    owners = torch.repeat_interleave(torch.arange(10), ranks)
    owners = owners.roll(int(torch.randint(160, (), generator=rng)))
    return torch.rand(modules, 10, generator=rng, dtype=torch.float64)[:, owners.repeat(3)[:rows]]


def runs(rng: torch.Generator, modules: int, rows: int) -> Tensor:
    """Runs of any length, of few coefficients, some with the same sigma."""
    starts = torch.rand(modules, rows, generator=rng) < float(torch.rand((), generator=rng)) ** 2
    values = torch.tensor([1.0, 0.7, -0.35, 1.4, 0.0, 1e-3], dtype=torch.float64)
    return values[(starts.cumsum(1) * 5) % 6]


def powers_of_two(rng: torch.Generator, modules: int, rows: int) -> Tensor:
    exponents = torch.randint(-9, 9, (modules, rows), generator=rng)
    return (
        torch.where(torch.rand(modules, rows, generator=rng) < 0.5, -1.0, 1.0)
        * 2.0 ** exponents.double()
    )


def with_zeros(rng: torch.Generator, modules: int, rows: int) -> Tensor:
    c = piecewise(rng, modules, rows)
    return c * (torch.rand(modules, rows, generator=rng) < 0.5)


PATTERNS: dict[str, Callable[[torch.Generator, int, int], Tensor | None]] = {
    "none": lambda rng, modules, rows: None,
    "one a client": piecewise,
    "runs": runs,
    "one a row": lambda rng, modules, rows: torch.randn(modules, rows, generator=rng).double(),
    "powers of two": powers_of_two,
    "some zero": with_zeros,
    "all zero": lambda rng, modules, rows: torch.zeros(modules, rows, dtype=torch.float64),
    "of 40 decades": lambda rng, modules, rows: (
        10.0 ** (40 * torch.rand(modules, rows, generator=rng, dtype=torch.float64) - 20)
    ),
    "one a client, of 40 decades": lambda rng, modules, rows: (
        10.0 ** (40 * piecewise(rng, modules, rows) - 20)
    ),
}


@settings(max_examples=120)
@given(
    modules=st.integers(0, 2),
    rows=st.one_of(st.integers(0, 40), st.sampled_from((64, 79, 130))),
    m=SIZES,
    n=SIZES,
    a_dtype=st.sampled_from(DTYPES),
    bt_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(list(PATTERNS)),
    offsets=st.tuples(*[st.sampled_from((0, 1, 5))] * 3),
    seed=st.integers(0, 2**31),
)
def test_the_equation(
    library: ctypes.CDLL,
    modules: int,
    rows: int,
    m: int,
    n: int,
    a_dtype: torch.dtype,
    bt_dtype: torch.dtype,
    dtype: torch.dtype,
    pattern: str,
    offsets: tuple[int, int, int],
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    A, Bt = random_stack(rng, modules, rows, m, n, a_dtype, bt_dtype)
    A, Bt = at_offset(A, offsets[0]), at_offset(Bt, offsets[1])
    c = PATTERNS[pattern](rng, modules, rows)
    expected = product(A, Bt, c)
    if dtype is torch.float16:  # 65504 at most
        expected = expected.clamp(-6e4, 6e4)
    out = at_offset(torch.full((modules, m, n), torch.nan, dtype=dtype), offsets[2])
    found = reconstruct(library, out, A, Bt, c, replace=True)
    if dtype is torch.float16:
        found = found.double().clamp(-6e4, 6e4)
    check(found, expected, tolerance(A, Bt, c, dtype, expected))

    base = at_offset(normal(rng, modules, m, n, dtype=dtype), offsets[2])
    total = base.double() + product(A, Bt, c)
    found = reconstruct(library, base, A, Bt, c)
    if dtype is torch.float16:
        total, found = total.clamp(-6e4, 6e4), found.double().clamp(-6e4, 6e4)
    check(found, total, tolerance(A, Bt, c, dtype, total) + 2.0**-23 * total.abs())


@pytest.fixture
def small_device(library: ctypes.CDLL) -> Iterator[None]:
    """One multiprocessor, which eight blocks fill: a block makes several tiles of a row."""
    library.simt_set_multiprocessors(ctypes.c_int64(1))
    yield
    library.simt_set_multiprocessors(ctypes.c_int64(4))
    library.simt_set_shared_limit(ctypes.c_int64(232448))


@pytest.mark.usefixtures("small_device")
@pytest.mark.parametrize(
    ("dtype", "pattern", "shared"),
    [
        (torch.bfloat16, "none", 232448),
        (torch.bfloat16, "one a client", 232448),
        (torch.bfloat16, "one a row", 99 << 10),  # too little for b's panel
        (torch.float16, "none", 99 << 10),
        (torch.float32, "some zero", 232448),
    ],
)
def test_rows_of_tiles(
    library: ctypes.CDLL, rng: torch.Generator, dtype: torch.dtype, pattern: str, shared: int
) -> None:
    library.simt_set_shared_limit(ctypes.c_int64(shared))
    modules, rows, m, n = 8, 70, 3, 264
    A, Bt = random_stack(rng, modules, rows, m, n, dtype)
    c = PATTERNS[pattern](rng, modules, rows)
    base = normal(rng, modules, m, n, dtype=dtype)
    (found,) = in_every_order(library, lambda: (reconstruct(library, base.clone(), A, Bt, c),))
    total = base.double() + product(A, Bt, c)
    check(found, total, tolerance(A, Bt, c, dtype, total) + 2.0**-23 * total.abs())
    for module in (0, 5):
        one = slice(module, module + 1)
        alone = base[one].clone()
        reconstruct(library, alone, A[one], Bt[one], None if c is None else c[one])
        assert torch.equal(alone, found[one]), "the same bits alone and in a bucket"


def test_tiles_beyond_a_group(library: ctypes.CDLL, rng: torch.Generator) -> None:
    """Seventeen rows of tiles, one more than are made together."""
    A, Bt = random_stack(rng, 1, 5, 16 * 128 + 3, 130, torch.bfloat16)
    found = torch.full((1, Bt.shape[2], 130), torch.nan)
    reconstruct(library, found, A, Bt, None, replace=True)
    expected = product(A, Bt)
    check(found, expected, tolerance(A, Bt, None, torch.float32, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_where_the_equation_is(
    library: ctypes.CDLL, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """Small integers, and powers of two for coefficients: one entry or row out of place is seen."""
    A, Bt = (torch.randint(-8, 9, (2, 37, size), generator=rng).to(dtype) for size in (133, 75))
    owners = torch.repeat_interleave(torch.arange(6), torch.tensor([20, 1, 3, 2, 8, 3]))
    for c in (None, torch.tensor([1.0, 2.0, -0.5, 0.0, 8.0, -1.0]).double()[owners].expand(2, -1)):
        given_c = None if c is None else c.contiguous()
        found = torch.zeros(2, 75, 133)
        reconstruct(library, found, A, Bt, given_c)
        assert torch.equal(found.double(), product(A, Bt, given_c))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """256 ones and 2^-8 on top of 256: additions in the base's dtype would all be lost."""
    A, Bt = torch.ones(1, 256, 1, dtype=dtype), torch.ones(1, 256, 1, dtype=dtype)
    for c in (torch.full((1, 256), 2.0**-7), torch.full((1, 256), 2.0 / 256 * 1.5)):
        base = torch.full((1, 1, 1), 256.0, dtype=dtype)
        reconstruct(library, base, A, Bt, c.double())
        assert float(base) == float(torch.tensor(256.0 + float(c.sum())).to(dtype))


def test_a_base_without_rows_stays(library: ctypes.CDLL, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 2, 0, 9, 7)
    for c in (None, torch.zeros(2, 0, dtype=torch.float64)):
        base = normal(rng, 2, 9, 7)
        assert torch.equal(reconstruct(library, base.clone(), A, Bt, c), base)
        out = torch.full((2, 9, 7), torch.nan)
        assert torch.equal(reconstruct(library, out, A, Bt, c, replace=True), torch.zeros(2, 9, 7))


NONFINITE = (torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["A", "Bt", "c", "base"])
def test_what_is_not_finite_is_seen_where_it_belongs(
    library: ctypes.CDLL, dtype: torch.dtype, value: float, where: str, rng: torch.Generator
) -> None:
    """A coefficient of zero does not hide it, as in fp32 arithmetic."""
    A, Bt = random_stack(rng, 2, 20, 6, 11, dtype)
    c = PATTERNS["some zero"](rng, 2, 20)
    assert c is not None
    base = normal(rng, 2, 6, 11, dtype=dtype)
    touched = torch.zeros(2, 6, 11, dtype=torch.bool)
    if where == "A":
        A[1, 3, 5] = value
        touched[1, :, 5] = True
    elif where == "Bt":
        Bt[0, 17, 2] = value
        touched[0, 2] = True
    elif where == "c":
        c[1, 19] = value
        touched[1] = True
    else:
        base[0, 1, 2] = value
        touched[0, 1, 2] = True
    found = reconstruct(library, base, A, Bt, c)
    assert torch.equal(~torch.isfinite(found), touched)
    if value != value:
        assert bool(torch.isnan(found[touched]).all())


def test_the_ends_of_the_range(library: ctypes.CDLL) -> None:
    """The largest values do not become infinite by rounding to terms, and of values down to 2^-126
    those bits count that lie above bf16's last one, 2^-133."""
    ones = torch.ones(1, 1, 1)
    for value in (3.4028234e38, -3.39e38, 1.7e38, 1.2e-38, 3e-36):
        A = torch.full((1, 1, 1), value)
        found = torch.zeros(1, 1, 1)
        reconstruct(library, found, A, ones, None)
        assert abs(float(found) - float(A)) <= 2.0**-134
    largest = torch.full((1, 1, 1), 6e4, dtype=torch.float16)
    assert torch.isinf(reconstruct(library, largest.clone(), largest, ones, None)).all()
