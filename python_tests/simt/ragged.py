"""The launchers of stack, scan and redistribute on CPU tensors, in every order of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from simt.build import CSRC, SHIM, address, in_every_order, load
from stacks import CODES, Bucket
from torch import Tensor


@cache
def library() -> ctypes.CDLL:
    names = ("stack", "scan", "redistribute")
    kernels = [CSRC / "cuda" / f"{name}.cu" for name in names]
    return load("ragged", [*kernels, SHIM / "ragged_exports.cpp"])


def int64(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def list_of(flats: Sequence[Tensor]) -> tuple[object, object, ctypes.c_int64]:
    """The buffers as the launchers take them: addresses, sizes in bytes, and how many."""
    addresses = (ctypes.c_void_p * len(flats))(*[flat.data_ptr() for flat in flats])
    sizes = (ctypes.c_int64 * len(flats))(*[flat.numel() * flat.element_size() for flat in flats])
    return addresses, sizes, ctypes.c_int64(len(flats))


def stack_into(
    A: Tensor, Bt: Tensor, flats: Sequence[Tensor], slots: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Non-finite counts and sums of squares."""
    modules, rows, n = A.shape
    nonfinite = torch.full((len(slots), 2), 77)
    sums = torch.full((2, modules, rows), torch.nan, dtype=torch.float64)
    library().simt_stack(
        *list_of(flats),
        address(slots),
        *int64(len(slots)),
        address(scale),
        address(A),
        address(Bt),
        *int64(CODES[A.dtype], modules, rows, Bt.shape[2], n),
        address(nonfinite),
        address(sums),
    )
    return nonfinite, sums


def stack(
    bucket: Bucket, dtype: torch.dtype, scale: Tensor | None = None, slots: Tensor | None = None
) -> tuple[Tensor, ...]:
    """A, Bt, non-finite counts and sums of squares."""

    def run() -> tuple[Tensor, ...]:
        # What the slabs held before must not be seen.
        A = torch.full((bucket.modules, bucket.rows, bucket.n), torch.nan, dtype=dtype)
        Bt = torch.full((bucket.modules, bucket.rows, bucket.m), torch.nan, dtype=dtype)
        found = stack_into(A, Bt, bucket.flats, bucket.slots if slots is None else slots, scale)
        return A, Bt, *found

    return in_every_order(library(), run)


def scan(flat: Tensor, spans: Tensor) -> tuple[Tensor, ...]:
    def run() -> tuple[Tensor, ...]:
        nonfinite = torch.full((len(spans),), 77)
        sums = torch.full((len(spans),), torch.nan, dtype=torch.float64)
        library().simt_scan(
            address(flat),
            *int64(flat.numel() * flat.element_size()),
            address(spans),
            *int64(len(spans)),
            address(nonfinite),
            address(sums),
        )
        return nonfinite, sums

    return in_every_order(library(), run)


def redistribute(
    flats: Sequence[Tensor], U: Tensor, S: Tensor, Vt: Tensor, slots: Tensor, scalings: Tensor
) -> list[Tensor]:
    """Copies of `flats` with what is handed out."""

    def run() -> tuple[Tensor, ...]:
        written = tuple(flat.clone() for flat in flats)
        modules, m, r = U.shape
        library().simt_redistribute(
            address(U),
            address(S),
            address(Vt),
            *int64(modules, m, Vt.shape[2], r),
            address(slots),
            address(scalings),
            *int64(len(slots)),
            *list_of(written),
        )
        return written

    return list(in_every_order(library(), run))
