"""The SVD of the small core matrices, run on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from simt.build import CSRC, SHIM, address, in_every_order, load
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
NO_SHARED = 34 << 10  # bytes of shared memory too few for matrices of more than 64 rows


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


def core_svd(
    library: ctypes.CDLL, c: Tensor, skip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    modules, size, _ = c.shape
    u, v = torch.full_like(c, torch.nan), torch.full_like(c, torch.nan)
    s = torch.full((modules, size), torch.nan, dtype=torch.float64)
    library.small_core_svd(
        *[address(c), ctypes.c_int64(modules), ctypes.c_int64(size)],
        *[skip if skip is None else address(skip), address(u), address(s), address(v)],
    )
    return u, s, v


def randn(*shape: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def with_spectrum(s: Tensor, seed: int) -> Tensor:
    size = len(s)
    u, v = (torch.linalg.qr(randn(size, size, seed=seed + i))[0] for i in range(2))
    c: Tensor = (u * s) @ v.mT
    return c


def check(c: Tensor, u: Tensor, s: Tensor, v: Tensor) -> None:
    size = c.shape[-1]
    for k in range(len(c)):
        scale = 2.0 ** float(c[k].abs().max().clamp(min=1e-300).log2().round())
        expected = torch.linalg.svdvals(c[k] / scale)
        largest = float(expected[0])
        assert (s[k].diff() <= 0).all() and (s[k] >= 0).all()
        assert (s[k] / scale - expected).abs().max() <= 1e-14 * largest * max(1, size / 40)
        kept = int((s[k] > size * EPS * s[k, 0]).sum())
        assert (u[k, :, kept:] == 0).all() and (v[k, :, kept:] == 0).all()
        product = (u[k] * (s[k] / scale)) @ v[k].mT
        assert (product - c[k] / scale).abs().max() <= 1e-10 * largest
        for vectors in (u[k, :, :kept], v[k, :, :kept]):
            limit = 1e-10 + 8 * size * EPS * largest / (s[k, :kept] / scale)
            gram = vectors.mT @ vectors - torch.eye(kept, dtype=torch.float64)
            assert (gram.abs() <= torch.maximum(limit[:, None], limit)).all()


@pytest.mark.parametrize(
    ("size", "shared"),
    [
        *[(size, None) for size in (1, 2, 3, 8, 17, 32, 45, 70, 100, 131)],
        (65, NO_SHARED),
        (139, NO_SHARED),
    ],
)
def test_random_matrices(library: ctypes.CDLL, size: int, shared: int | None) -> None:
    c = randn(2 if size < 60 else 1, size, size, seed=size)
    with shared_limit(library, shared):
        check(c, *core_svd(library, c))


def hostile(size: int) -> Tensor:
    low_rank = randn(size, 5, seed=1) @ randn(5, size, seed=2)
    triangle = randn(size, size, seed=3).triu() * torch.logspace(0, -12, size)[:, None].double()
    clusters = torch.ones(size, dtype=torch.float64)
    clusters[size // 2 :] = 1e-6
    return torch.stack(
        [
            torch.ones(size, size, dtype=torch.float64),
            torch.zeros(size, size, dtype=torch.float64),
            torch.eye(size, dtype=torch.float64),
            with_spectrum(torch.logspace(0, -16, size, dtype=torch.float64), 4),
            with_spectrum(clusters, 6),
            low_rank,
            triangle,
            1e150 * randn(size, size, seed=8),
            1e-150 * randn(size, size, seed=9),
        ]
    )


@pytest.mark.parametrize("shared", [None, NO_SHARED])
def test_hostile_matrices(library: ctypes.CDLL, shared: int | None) -> None:
    c = hostile(44 if shared is None else 66)
    with shared_limit(library, shared):
        check(c, *core_svd(library, c))


@pytest.mark.parametrize("shared", [None, NO_SHARED])
def test_equal_bits_in_every_order_and_in_every_batch(library: ctypes.CDLL, shared: int | None) -> None:
    c = torch.stack([randn(66, 66, seed=11), with_spectrum(torch.logspace(0, -9, 66).double(), 12)])
    with shared_limit(library, shared):
        both = in_every_order(library, lambda: core_svd(library, c))
        for k in range(2):
            for alone, batched in zip(core_svd(library, c[k : k + 1].clone()), both, strict=True):
                assert torch.equal(alone[0], batched[k])


@pytest.mark.parametrize("shared", [None, NO_SHARED])
def test_matrices_that_are_not_finite_come_to_an_end(library: ctypes.CDLL, shared: int | None) -> None:
    c = torch.stack([randn(66, 66, seed=13)] * 4)
    c[1, 3, 5] = torch.nan
    c[2, 7, 0] = torch.inf
    c[3] = torch.nan
    with shared_limit(library, shared):
        found = core_svd(library, c)
    check(c[:1], *(tensor[:1] for tensor in found))


@pytest.mark.parametrize("shared", [None, NO_SHARED])
def test_modules_that_are_skipped_are_left_as_they_are(library: ctypes.CDLL, shared: int | None) -> None:
    c = randn(3, 66, 66, seed=15)
    c[1] = torch.nan
    with shared_limit(library, shared):
        found = core_svd(library, c, torch.tensor([0, 1, 0], dtype=torch.int32))
        for tensor, alone in zip(found, core_svd(library, c[2:].clone()), strict=True):
            assert tensor[1].isnan().all()
            assert torch.equal(tensor[2], alone[0])


def test_subnormal_matrices(library: ctypes.CDLL) -> None:
    u, s, v = core_svd(library, 1e-312 * randn(2, 9, 9, seed=14))
    assert (s >= 0).all() and s.max() < 1e-310
    assert u.isfinite().all() and v.isfinite().all()


def test_no_rows_and_no_modules(library: ctypes.CDLL) -> None:
    core_svd(library, torch.empty(2, 0, 0, dtype=torch.float64))
    core_svd(library, torch.empty(0, 3, 3, dtype=torch.float64))
