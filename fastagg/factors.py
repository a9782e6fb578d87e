"""Stacking and reconstruction for one module's lists of factors: the ops, without a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastagg import ops
from fastagg.devices import pinned, uploaded


def stack(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    weights: Sequence[float] | Tensor | None = None,
    scalings: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """FLoRA's stack (arXiv 2409.05976): A = [w_1 s_1 A_1; ..; w_K s_K A_K], B = [B_1 .. B_K].

    Args:
        As, Bs: K factors (r_k, n) and (m, r_k) of any ranks; float32, bfloat16 or float16, mixed.
        weights, scalings: K numbers each, or None for ones. Weights need not sum to 1.
        dtype: of the result; default float32, because w_k s_k A_k rounded to 16 bits is not exact.

    Returns:
        A (R, n) and B (m, R) with R = sum r_k, so that B A = sum w_k s_k B_k A_k.

    Raises:
        ValueError: unlike counts, shapes, dtypes or devices.
    """
    scale = _coefficients(As, Bs, weights, scalings)
    slab_a, slab_bt = _slabs(As, Bs, scale, torch.float32 if dtype is None else dtype)
    return slab_a[0], slab_bt[0].mT.contiguous()


def reconstruct(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    weights: Sequence[float] | Tensor | None = None,
    scalings: Sequence[float] | Tensor | None = None,
    base: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """dW = sum_k w_k s_k B_k A_k (m, n), or base + dW in place where `base` (m, n) is given.

    Products and sums are fp32 and rounded once, to `dtype` or to the base's. Returns dW, or `base`.
    Raises ValueError for unlike counts, shapes, dtypes or devices. O(m n R).
    """
    scale = _coefficients(As, Bs, weights, scalings)
    dtypes = {tensor.dtype for tensor in (*As, *Bs)}
    common = dtypes.pop() if len(dtypes) == 1 else torch.float32
    slab_a, slab_bt = _slabs(As, Bs, None, common)
    ranks = torch.tensor([A.shape[0] for A in As])
    rows = uploaded(scale.repeat_interleave(ranks)[None], slab_a.device)
    if base is None:
        return ops.reconstruct(slab_a, slab_bt, rows, dtype=dtype)[0]
    expected = (slab_bt.shape[2], slab_a.shape[2])
    if tuple(base.shape) != expected:
        raise ValueError(f"base: expected shape {expected}, got {tuple(base.shape)}")
    if base.dtype not in ops.DTYPE_CODES or base.device != slab_a.device:
        raise ValueError(
            f"base: expected float32, bfloat16 or float16 on {slab_a.device}, got {base.dtype} on "
            f"{base.device}"
        )
    if base.requires_grad and torch.is_grad_enabled():
        raise ValueError("base requires a gradient: add to it under torch.no_grad()")
    ops.reconstruct_(base[None], slab_a, slab_bt, rows)
    return base


def _coefficients(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    weights: Sequence[float] | Tensor | None,
    scalings: Sequence[float] | Tensor | None,
) -> Tensor:
    """w_k s_k (K,) float64 on the CPU, after the factors are checked against each other."""
    count = len(As)
    if count == 0 or len(Bs) != count:
        raise ValueError(f"expected as many A as B and at least one, got {count} and {len(Bs)}")
    product = torch.ones(count, dtype=torch.float64)
    for name, given in (("weights", weights), ("scalings", scalings)):
        if given is None:
            continue
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
        if tuple(values.shape) != (count,):
            raise ValueError(f"{name}: expected {count} numbers, got shape {tuple(values.shape)}")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: expected finite numbers, got {values.tolist()}")
        product = product * values
    for k, (A, B) in enumerate(zip(As, Bs, strict=True)):
        if A.dim() != 2 or B.dim() != 2:
            raise ValueError(
                f"client {k}: expected A (r, n) and B (m, r), got {tuple(A.shape)} and "
                f"{tuple(B.shape)}"
            )
    n, m = As[0].shape[1], Bs[0].shape[0]
    for k, (A, B) in enumerate(zip(As, Bs, strict=True)):
        rank = A.shape[0]
        if tuple(A.shape) != (rank, n) or tuple(B.shape) != (m, rank):
            raise ValueError(
                f"client {k}: expected A (r, {n}) and B ({m}, r), got {tuple(A.shape)} and "
                f"{tuple(B.shape)}"
            )
        for name, tensor in (("A", A), ("B", B)):
            if tensor.dtype not in ops.DTYPE_CODES:
                raise ValueError(
                    f"client {k}, {name}: expected float32, bfloat16 or float16, got "
                    f"{tensor.dtype}; cast it first"
                )
            if tensor.device != As[0].device:
                raise ValueError(f"client {k}, {name}: expected {As[0].device}, got {tensor.device}")
    return product


def _slabs(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The (1, R, n) and (1, R, m) slabs: every factor is a flat buffer of its own."""
    slots, row = [], 0
    for k, (A, B) in enumerate(zip(As, Bs, strict=True)):
        codes = ops.DTYPE_CODES[A.dtype], ops.DTYPE_CODES[B.dtype]
        slots.append([0, row, A.shape[0], 2 * k, 0, codes[0], 2 * k + 1, 0, codes[1]])
        row += A.shape[0]
    flats = [tensor.detach().contiguous() for pair in zip(As, Bs, strict=True) for tensor in pair]
    device = As[0].device
    A, Bt, _, _ = ops.stack(
        flats,
        pinned(torch.tensor(slots, dtype=torch.int64), device),
        None if scale is None else pinned(scale, device),
        modules=1,
        rows=row,
        m=Bs[0].shape[0],
        n=As[0].shape[-1],
        dtype=dtype,
    )
    return A, Bt
