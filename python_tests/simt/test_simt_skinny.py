"""The products of a slab with a skinny matrix on bf16 terms, on the CPU, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt.build import CSRC, SHIM, address, in_every_order, load
from stacks import CODES, DTYPES, normal
from torch import Tensor

SIZES = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 33, 64, 65, 127, 129)))
COLUMNS = st.one_of(st.integers(1, 9), st.sampled_from((63, 64, 65, 100, 128, 130)))
OPS = ("contract", "expand")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load("skinny", [CSRC / "cuda" / "skinny.cu", SHIM / "skinny_exports.cpp"])


def int64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """The same values `offset` elements into a buffer of their own."""
    buffer = torch.zeros(offset + tensor.numel(), dtype=tensor.dtype)
    return buffer[offset:].view(tensor.shape).copy_(tensor)


def slab_arguments(slab: Tensor, scale: Tensor | None) -> tuple[object, ...]:
    _, rows, cols = slab.shape
    return (address(slab), int64(CODES[slab.dtype]), int64(rows), int64(cols), address(scale))


def multiply(
    library: ctypes.CDLL,
    op: str,
    slab: Tensor,
    x: Tensor,
    *,
    terms: int = 3,
    scale: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    modules, rows, cols = slab.shape
    columns = x.shape[2]
    out = torch.full((modules, rows if op == "contract" else cols, columns), torch.nan)
    arguments = [*slab_arguments(slab, scale), *([address(after)] if op == "contract" else [])]
    arguments += [address(x), int64(modules), int64(columns), address(out), int64(terms)]
    getattr(library, f"simt_{op}")(*arguments)
    return out


def contract_signs(
    library: ctypes.CDLL,
    slab: Tensor,
    columns: int,
    seed: int,
    streams: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    out = torch.full((*slab.shape[:2], columns), torch.nan)
    library.simt_contract_signs(
        *slab_arguments(slab, scale),
        address(after),
        ctypes.c_uint64(seed),
        address(streams),
        int64(slab.shape[0]),
        int64(columns),
        address(out),
    )
    return out


def signs(library: ctypes.CDLL, seed: int, stream: int, rows: int, columns: int) -> Tensor:
    out = torch.empty(rows, columns)
    library.simt_signs(ctypes.c_uint64(seed), ctypes.c_uint64(stream), int64(out.numel()), address(out))
    return out


def equation(
    op: str, slab: Tensor, x: Tensor, scale: Tensor | None = None, after: Tensor | None = None
) -> Tensor:
    left = slab.double() if scale is None else slab.double() * scale[..., None]
    result = (left if op == "contract" else left.mT) @ x.double()
    return result if after is None else after[..., None] * result


def tolerance(
    op: str,
    slab: Tensor,
    x: Tensor,
    terms: int = 3,
    scale: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Of sum |slab x|: what is left of x, 2^-8 for each of its terms, or of the pairs, 2^-23. Of what
    the sum can be, in units of 2^-24: additions cut off, 2, between two that round, of one pair of
    terms in each of four steps or of all in one; those that round; and the result. One term of x with
    a bf16 slab is cut off in every step, which 2^-8 hides."""
    most = equation(op, slab.abs(), x.abs(), scale, None if after is None else after.abs())
    steps = -(-x.shape[1] // 16)
    slab_terms = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[slab.dtype]
    pairs = sum(i + j < 3 for i in range(slab_terms) for j in range(terms))
    units = 2 + (2 * min(4, steps) + -(-steps // 4) if pairs == 1 else 2 * pairs + steps) + 1
    return (units * 2.0**-24 + (2.0 ** (-8 * terms) if terms < 3 else 0.0)) * most + 2.0**-149


def check(found: Tensor, expected: Tensor, allowed: Tensor) -> None:
    excess = (found.double() - expected).abs() - allowed
    assert not excess.numel() or float(excess.max()) <= 0


def powers_of_two(rng: torch.Generator, *shape: int) -> Tensor:
    return 2.0 ** torch.randint(-60, 60, shape, generator=rng).double()


@settings(max_examples=100)
@given(
    op=st.sampled_from(OPS),
    modules=st.integers(0, 2),
    rows=SIZES,
    cols=SIZES,
    columns=COLUMNS,
    dtype=st.sampled_from(DTYPES),
    terms=st.integers(1, 3),
    scaled=st.booleans(),
    offsets=st.tuples(st.sampled_from((0, 1, 4)), st.sampled_from((0, 1, 4))),
    seed=st.integers(0, 2**31),
)
def test_products(
    library: ctypes.CDLL,
    op: str,
    modules: int,
    rows: int,
    cols: int,
    columns: int,
    dtype: torch.dtype,
    terms: int,
    scaled: bool,
    offsets: tuple[int, int],
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    slab = at_offset(normal(rng, modules, rows, cols, dtype=dtype), offsets[0])
    x = at_offset(normal(rng, modules, cols if op == "contract" else rows, columns), offsets[1])
    scale = powers_of_two(rng, modules, rows) if scaled else None
    after = None
    if scaled and op == "contract":
        after = torch.randn(modules, rows, generator=rng, dtype=torch.float64)
    found = multiply(library, op, slab, x, terms=terms, scale=scale, after=after)
    allowed = tolerance(op, slab, x, terms, scale, after)
    check(found, equation(op, slab, x, scale, after), allowed)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_in_every_order(
    library: ctypes.CDLL, op: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """All terms positive: a sum that is cut off at each step would lose 2^-24 of itself every time."""
    rows, cols = (3, 1000) if op == "contract" else (1000, 5)
    slab = torch.rand(2, rows, cols, generator=rng).to(dtype)
    x = torch.rand(2, 1000, 7, generator=rng)
    (found,) = in_every_order(library, lambda: (multiply(library, op, slab, x),))
    expected = equation(op, slab, x)
    check(found, expected, tolerance(op, slab, x))
    assert float(((found.double() - expected) / expected).mean().abs()) < 8 * 2.0**-24
    for module in range(2):
        one = slice(module, module + 1)
        alone = multiply(library, op, slab[one], x[one])
        assert torch.equal(alone, found[one]), "the same bits alone and in a bucket"


@settings(max_examples=40)
@given(
    modules=st.integers(1, 2),
    rows=st.integers(1, 20),
    cols=st.one_of(st.integers(1, 40), st.sampled_from((127, 140, 257))),
    columns=COLUMNS,
    seed=st.integers(0, 2**63),
    streams=st.one_of(st.none(), st.tuples(*[st.integers(0, 2**62)] * 2)),
)
def test_signs_are_those_of_the_cpu(
    library: ctypes.CDLL,
    modules: int,
    rows: int,
    cols: int,
    columns: int,
    seed: int,
    streams: tuple[int, int] | None,
) -> None:
    """Sums of small integers are exact, so one wrong sign is seen."""
    rng = torch.Generator().manual_seed(seed & 0xFFFFFFFF)
    slab = torch.randint(1, 128, (modules, rows, cols), generator=rng).bfloat16()
    table = None if streams is None else torch.tensor(streams)
    found = contract_signs(library, slab, columns, seed, table)
    for module in range(modules):
        stream = module if streams is None else streams[module]
        matrix = signs(library, seed, stream, cols, columns)
        assert torch.equal(found[module].double(), slab[module].double() @ matrix.double())


def test_signs_beyond_a_tile_and_in_every_order(library: ctypes.CDLL, rng: torch.Generator) -> None:
    for dtype, cols, columns in (
        (torch.float32, 40, 300),
        (torch.float16, 299, 64),
        (torch.bfloat16, 130, 128),
    ):
        slab = normal(rng, 2, 130 if cols == 40 else 5, cols, dtype=dtype)
        scale, after = powers_of_two(rng, *slab.shape[:2]), powers_of_two(rng, *slab.shape[:2])
        run = lambda: (contract_signs(library, slab, columns, 7, scale=scale, after=after),)  # noqa: B023, E731
        (found,) = in_every_order(library, run)
        x = torch.stack([signs(library, 7, stream, cols, columns) for stream in range(2)])
        expected = equation("contract", slab, x, scale, after)
        check(found, expected, tolerance("contract", slab, x, 3, scale, after))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite_is_seen_where_it_belongs(
    library: ctypes.CDLL, op: str, terms: int, dtype: torch.dtype, value: float, rng: torch.Generator
) -> None:
    slab = normal(rng, 2, 20, 30, dtype=dtype)
    x = normal(rng, 2, 30 if op == "contract" else 20, 5)
    slab[1, 3, 7] = value
    touched = torch.zeros(2, 20 if op == "contract" else 30, 5, dtype=torch.bool)
    touched[1, 3 if op == "contract" else 7] = True
    x[0, 1, 2] = value
    touched[0, :, 2] = True
    found = multiply(library, op, slab, x, terms=terms)
    assert torch.equal(~torch.isfinite(found), touched)
    if value != value:
        assert bool(torch.isnan(found[touched]).all())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [3.4e38, -3.39e38, 1.2e-38, 3e-45])
def test_the_ends_of_the_range(library: ctypes.CDLL, op: str, value: float) -> None:
    """Scaled to about one before they are split, values keep every bit."""
    slab = torch.full((1, 1, 1), value)
    exponent = round(float(slab.abs().double().log2()))
    scale = torch.full((1, 1), 2.0 ** min(126, -exponent), dtype=torch.float64)
    found = multiply(library, op, slab, torch.ones(1, 1, 1), scale=scale)
    assert float(found) == float(slab.double() * scale)
    for terms in (1, 2, 3):  # as a skinny operand too, nothing finite becomes infinite
        found = multiply(library, op, torch.ones(1, 1, 1), slab, terms=terms)
        assert abs(float(found) - float(slab)) <= 2.0 ** (-8 * terms) * abs(float(slab)) + 2.0**-134


@pytest.mark.parametrize("op", OPS)
def test_a_sum_of_nothing_is_zero(library: ctypes.CDLL, op: str) -> None:
    slab = torch.zeros((2, 3, 0) if op == "contract" else (2, 0, 3))
    found = multiply(library, op, slab, torch.zeros(2, 0, 4))
    assert torch.equal(found, torch.zeros(2, 3, 4))
