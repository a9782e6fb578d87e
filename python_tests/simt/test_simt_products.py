"""The fp64 tensor core products against float64 matmul."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt.build import CSRC, SHIM, address, in_every_order, load
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
EPS = 2.0**-52
SIZES = st.one_of(st.integers(1, 9), st.sampled_from((31, 63, 64, 65, 70, 129)))
DEPTHS = st.one_of(st.integers(0, 9), st.sampled_from((15, 16, 17, 32, 33, 40)))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load("products", [CSRC / "cuda" / "products.cu", SHIM / "products_exports.cpp"])


def matrices(
    rng: torch.Generator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    columns: bool = False,
    offset: int = 0,
    gap: int = 0,
) -> Tensor:
    """(modules, rows, cols), `offset` elements into a buffer, lines `gap` elements apart."""
    modules, rows, cols = shape
    lines, length = (cols, rows) if columns else (rows, cols)
    module = lines * (length + gap)
    flat = torch.randn(offset + modules * module, generator=rng, dtype=torch.float64).to(dtype)
    matrix = flat.as_strided((modules, lines, length), (module, length + gap, 1), offset)
    return matrix.mT if columns else matrix


def int64s(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def multiply(
    library: ctypes.CDLL, x: Tensor, y: Tensor, out: Tensor, skip: Tensor | None = None
) -> Tensor:
    shape = (x.shape[0], x.shape[1], y.shape[2], x.shape[2])
    arguments: list[object] = []
    for matrix in (x, y, out):
        code = ctypes.c_int64(CODES[matrix.dtype])
        arguments += [address(matrix), code, int64s(matrix.stride())]
    library.multiply_f64(*arguments, int64s(shape), address(skip))
    return out


def inner_products(library: ctypes.CDLL, x: Tensor) -> Tensor:
    modules, size, _ = x.shape
    out = torch.full((modules, size, size), torch.nan, dtype=torch.float64)
    code, sizes = ctypes.c_int64(CODES[x.dtype]), (ctypes.c_int64(v) for v in x.shape)
    library.inner_products_f64(address(x), code, int64s(x.stride()), address(out), *sizes)
    return out


def assert_is_the_product(found: Tensor, x: Tensor, y: Tensor) -> None:
    x, y = x.double(), y.double()
    allowed = (x.shape[2] + 2) * EPS * (x.abs() @ y.abs())
    if found.dtype == torch.float32:
        allowed = allowed + (x @ y).abs() * 2.0**-24 + 2.0**-149
    assert ((found.double() - x @ y).abs() <= allowed).all()


dtypes = st.sampled_from(tuple(CODES))


@settings(max_examples=80)
@given(
    modules=st.integers(1, 2),
    sizes=st.tuples(SIZES, SIZES, DEPTHS),
    kinds=st.tuples(dtypes, dtypes, st.sampled_from((torch.float32, torch.float64))),
    columns=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    offsets=st.tuples(*[st.integers(0, 3)] * 3),
    gaps=st.tuples(*[st.sampled_from((0, 0, 1, 8))] * 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_dtype_and_layout(
    library: ctypes.CDLL,
    modules: int,
    sizes: tuple[int, int, int],
    kinds: tuple[torch.dtype, torch.dtype, torch.dtype],
    columns: tuple[bool, bool, bool],
    offsets: tuple[int, int, int],
    gaps: tuple[int, int, int],
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    m, n, k = sizes
    shapes = ((modules, m, k), (modules, k, n), (modules, m, n))
    x, y, out = (
        matrices(rng, shape, dtype, columns=by_column, offset=offset, gap=gap)
        for shape, dtype, by_column, offset, gap in zip(
            shapes, kinds, columns, offsets, gaps, strict=True
        )
    )
    buffer = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    between = torch.ones_like(buffer, dtype=torch.bool)
    between.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    before = buffer.clone()
    assert_is_the_product(multiply(library, x, y, out), x, y)
    assert torch.equal(buffer[between], before[between]), "nothing beside the matrix is written"


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", CODES)
def test_the_order_of_threads_is_not_seen(
    library: ctypes.CDLL, dtype: torch.dtype, columns: bool, rng: torch.Generator
) -> None:
    x = matrices(rng, (1, 72, 40), dtype, columns=columns)
    y = matrices(rng, (1, 40, 24), dtype, columns=columns)

    def run() -> tuple[Tensor, ...]:
        out = torch.empty(1, 72, 24, dtype=torch.float64)
        return multiply(library, x, y, out), inner_products(library, x)

    product, squares = in_every_order(library, run)
    assert_is_the_product(product, x, y)
    assert_is_the_product(squares, x, x.mT)


@settings(max_examples=30)
@given(
    modules=st.integers(1, 2),
    size=SIZES,
    k=DEPTHS,
    dtype=dtypes,
    columns=st.booleans(),
    offset=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_inner_products_are_symmetric_to_the_bit(
    library: ctypes.CDLL,
    modules: int,
    size: int,
    k: int,
    dtype: torch.dtype,
    columns: bool,
    offset: int,
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = matrices(rng, (modules, size, k), dtype, columns=columns, offset=offset)
    found = inner_products(library, x)
    assert torch.equal(found, found.mT)
    assert_is_the_product(found, x, x.mT)


def test_what_half_precision_cannot_round_is_exact(library: ctypes.CDLL) -> None:
    """Subnormals, the largest values and both zeros, each alone in its sum."""
    bits = torch.tensor([1, 0x3FF, 0x400, 0x7BFF, 0x8001, 0xFBFF, 0, 0x8000]).to(torch.uint16)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.diag(bits.view(dtype).double()).to(dtype)[None]
        y = torch.eye(8, dtype=torch.float64)[None]
        found = multiply(library, x, y, torch.empty(1, 8, 8, dtype=torch.float64))
        assert torch.equal(found, x.double())


def test_a_module_alone_has_the_bits_it_has_among_others(
    library: ctypes.CDLL, rng: torch.Generator
) -> None:
    x = matrices(rng, (3, 66, 50), torch.float32)
    y = matrices(rng, (3, 50, 10), torch.float64, columns=True)
    together = multiply(library, x, y, torch.empty(3, 66, 10, dtype=torch.float64))
    squares = inner_products(library, x)
    for module in range(3):
        one = slice(module, module + 1)
        alone = multiply(library, x[one], y[one], torch.empty(1, 66, 10, dtype=torch.float64))
        assert torch.equal(alone, together[one])
        assert torch.equal(inner_products(library, x[one]), squares[one])


def test_modules_that_are_skipped_keep_what_they_hold(
    library: ctypes.CDLL, rng: torch.Generator
) -> None:
    x, y = matrices(rng, (3, 5, 7), torch.float32), matrices(rng, (3, 7, 6), torch.bfloat16)
    skip = torch.tensor([0, 3, 0], dtype=torch.int32)
    out = multiply(library, x, y, torch.full((3, 5, 6), 9.0), skip)
    assert bool((out[1] == 9).all())
    assert_is_the_product(out[::2], x[::2], y[::2])


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 70, 65, 0)]
)
def test_empty_shapes(library: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    modules, m, n, k = shape
    x, y = torch.ones(modules, m, k), torch.ones(modules, k, n)
    assert bool((multiply(library, x, y, torch.full((modules, m, n), torch.nan)) == 0).all())
    assert bool((inner_products(library, x) == k).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_values_stay_in_their_row_and_column(
    library: ctypes.CDLL, bad: float, rng: torch.Generator
) -> None:
    """The rows and the depths with which a tile is filled up must not meet them either."""
    x, y = matrices(rng, (2, 67, 19), torch.float32), matrices(rng, (2, 19, 66), torch.float32)
    x[0, 3, 18], y[0, 2, 65] = bad, bad
    found = multiply(library, x, y, torch.empty(2, 67, 66))
    expected = torch.zeros_like(found, dtype=torch.bool)
    expected[0, 3], expected[0, :, 65] = True, True
    assert torch.equal(~found.isfinite(), expected)
    squares = inner_products(library, x)
    expected = torch.zeros_like(squares, dtype=torch.bool)
    expected[0, 3], expected[0, :, 3] = True, True
    assert torch.equal(~squares.isfinite(), expected)
