"""The pivoted Cholesky factorisation and its triangular solve, run on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from simt.build import CSRC, SHIM, address, in_every_order, load
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
NO_SHARED = 18 << 10  # bytes of shared memory too few for matrices of more than 50 rows


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load(
        "small",
        [
            *[CSRC / "cuda" / f"{name}.cu" for name in ("cholesky", "core_svd", "products")],
            *[CSRC / "cuda" / f"{name}_jacobi.cu" for name in ("shared", "block")],
            SHIM / "small_exports.cpp",
        ],
    )


@contextmanager
def shared_limit(library: ctypes.CDLL, size: int | None) -> Iterator[None]:
    if size is not None:
        library.simt_set_shared_limit(ctypes.c_int64(size))
    yield
    library.simt_set_shared_limit(ctypes.c_int64(232448))


class Factored:
    """What one call returned, for the modules of a batch."""

    def __init__(
        self, library: ctypes.CDLL, g: Tensor, d: Tensor, tolerance: float, w: Tensor | None = None
    ) -> None:
        modules, size = d.shape
        self.factor = torch.full((modules, size, size), torch.nan, dtype=torch.float64)
        self.pivots = torch.full((modules, size), -1, dtype=torch.int32)
        self.rank = torch.full((modules,), -1, dtype=torch.int32)
        self.smallest = torch.full((modules,), torch.nan, dtype=torch.float64)
        self.dropped = self.smallest.clone()
        self.x = torch.full_like(w, torch.nan) if w is not None else torch.empty(0)
        library.small_cholesky(
            *[address(g), address(d), ctypes.c_int64(modules), ctypes.c_int64(size)],
            *[ctypes.c_double(tolerance), address(self.factor), address(self.pivots)],
            *[address(self.rank), address(self.smallest), address(self.dropped), address(w)],
            *[ctypes.c_int64(0 if w is None else w.shape[-1])],
            address(None if w is None else self.x),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.factor, self.pivots, self.rank, self.smallest, self.dropped, self.x


def reference(g: Tensor, tolerance: float) -> tuple[list[int], float, float]:
    """Pivots, the last one's value and what is dropped: one column at a time."""
    left = g.clone()
    used: list[int] = []
    first = smallest = 0.0
    while len(used) < len(g):
        diagonal = left.diagonal().clone()
        diagonal[used] = -torch.inf
        pivot = int(diagonal.argmax())
        value = float(diagonal[pivot])
        first = first or value
        if not value > tolerance * first or not value > 0:
            break
        column = left[:, pivot] / value**0.5
        column[used] = 0
        left -= column[:, None] * column
        used.append(pivot)
        smallest = value
    rest = left.diagonal().clone()
    rest[used] = 0
    return used, smallest, float(rest.clamp(min=0).sum())


def gram(size: int, rank: int, seed: int, decades: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(size, rank, generator=rng, dtype=torch.float64)
    x *= torch.logspace(0, -decades, size, dtype=torch.float64)[
        torch.randperm(size, generator=rng), None
    ]
    return x @ x.mT


def check(found: Factored, g: Tensor, d: Tensor, tolerance: float) -> None:
    for k in range(len(g)):
        scaled = d[k][:, None] * g[k] * d[k]
        pivots, smallest, dropped = reference(scaled, tolerance)
        rank = int(found.rank[k])
        assert rank == len(pivots)
        assert found.pivots[k, :rank].tolist() == pivots
        bound = 8 * len(scaled) * EPS * float(scaled.diagonal().max().clamp(min=0))
        mine = found.factor[k]
        assert (mine[:, rank:] == 0).all()
        assert (mine @ mine.mT - scaled).abs().max() <= bound + dropped
        lower = mine[pivots][:, :rank]
        assert (lower.triu(1) == 0).all() and (lower.diagonal() > 0).all()
        assert abs(float(found.smallest[k]) - smallest) <= bound
        assert abs(float(found.dropped[k]) - dropped) <= len(scaled) * bound


@pytest.mark.parametrize("shared", [None, NO_SHARED])
@pytest.mark.parametrize("size", [1, 2, 7, 31, 33, 64, 65, 100, 130])
def test_the_factor_is_that_of_the_definition(
    library: ctypes.CDLL, size: int, shared: int | None
) -> None:
    g = torch.stack([gram(size, size + 3, 1), gram(size, max(size // 2, 1), 2)])
    d = torch.stack([torch.ones(size), torch.rand(size, generator=torch.Generator().manual_seed(3))])
    d = d.double() + 0.25
    with shared_limit(library, shared):
        found = Factored(library, g, d, 1e-12)
    check(found, g, d, 1e-12)


@pytest.mark.parametrize("shared", [None, NO_SHARED])
def test_equal_bits_in_every_order_and_in_every_batch(library: ctypes.CDLL, shared: int | None) -> None:
    size, cols = 70, 19
    rng = torch.Generator().manual_seed(4)
    g = torch.stack([gram(size, size, 5, 3.0), gram(size, 20, 6)])
    d = torch.rand(2, size, generator=rng, dtype=torch.float64) + 0.5
    w = torch.randn(2, size, cols, generator=rng, dtype=torch.float64)
    with shared_limit(library, shared):
        both = in_every_order(library, lambda: Factored(library, g, d, 1e-12, w).tensors())
        for k in range(2):
            one = slice(k, k + 1)
            alone = Factored(library, g[one].clone(), d[one].clone(), 1e-12, w[one].clone())
            for mine, theirs in zip(alone.tensors(), both, strict=True):
                assert torch.equal(mine, theirs[one])


@pytest.mark.parametrize("shared", [None, NO_SHARED])
def test_hostile_matrices(library: ctypes.CDLL, shared: int | None) -> None:
    size = 66
    identical = torch.ones(size, size, dtype=torch.float64)
    zero = torch.zeros(size, size, dtype=torch.float64)
    graded = gram(size, size, 7, 8.0)
    tiny, huge = 1e-150 * gram(size, size, 8), 1e150 * gram(size, 40, 9)
    g = torch.stack([identical, zero, graded, tiny, huge])
    d = torch.ones(len(g), size, dtype=torch.float64)
    d[0] = torch.logspace(0, -3, size, dtype=torch.float64)
    tolerance = 4 * size * EPS
    with shared_limit(library, shared):
        found = Factored(library, g, d, tolerance)
    check(found, g, d, tolerance)
    assert found.rank.tolist() == [1, 0, int(found.rank[2]), size, 40]


@pytest.mark.parametrize("shared", [None, NO_SHARED])
def test_matrices_that_are_not_finite_come_to_an_end(library: ctypes.CDLL, shared: int | None) -> None:
    size = 66
    g = torch.stack([gram(size, size, 10)] * 4)
    g[1, 3, 5] = g[1, 5, 3] = torch.nan
    g[2, 0, 0] = torch.inf
    g[3] = torch.nan
    d = torch.ones(4, size, dtype=torch.float64)
    w = torch.ones(4, size, 3, dtype=torch.float64)
    with shared_limit(library, shared):
        found = Factored(library, g, d, 1e-12, w)
        alone = Factored(library, g[:1].clone(), d[:1].clone(), 1e-12, w[:1].clone())
    assert ((found.rank >= 0) & (found.rank <= size)).all()
    assert torch.equal(found.x[0], alone.x[0])


@pytest.mark.parametrize(
    ("size", "cols", "rank"), [(1, 1, 1), (7, 3, 7), (33, 16, 20), (70, 35, 70), (40, 5, 0)]
)
def test_coordinates_solve_for_the_pivots(library: ctypes.CDLL, size: int, cols: int, rank: int) -> None:
    rng = torch.Generator().manual_seed(size)
    x = torch.randn(2, 50 + size, rank, generator=rng, dtype=torch.float64)
    x = x @ torch.randn(2, rank, size, generator=rng, dtype=torch.float64)
    g = x.mT @ x
    d = torch.rand(2, size, generator=rng, dtype=torch.float64) + 0.5
    w = torch.randn(2, size, cols, generator=rng, dtype=torch.float64)
    found = Factored(library, g, d, 1e-10, w)
    for k in range(2):
        pivots = found.pivots[k, :rank].long()
        assert int(found.rank[k]) == rank
        lower = found.factor[k][pivots][:, :rank]
        expected = torch.zeros(size, cols, dtype=torch.float64)
        solved = torch.linalg.solve_triangular(lower.mT, w[k, :rank], upper=True)
        expected[pivots] = d[k][pivots, None] * solved
        bound = 1e-14 * size * float(torch.linalg.cond(lower) if rank else 1) * float(w.abs().max())
        assert (found.x[k] - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


def test_no_rows_and_no_modules(library: ctypes.CDLL) -> None:
    empty = Factored(library, torch.empty(2, 0, 0).double(), torch.empty(2, 0).double(), 1e-12)
    assert empty.rank.tolist() == [0, 0] and empty.dropped.tolist() == [0.0, 0.0]
    Factored(library, torch.empty(0, 3, 3).double(), torch.empty(0, 3).double(), 1e-12)
