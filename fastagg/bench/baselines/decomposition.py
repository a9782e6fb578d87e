"""The best rank-r approximation of dW: U S (m, r) and Vt (r, n), in every way that is in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastagg.bench.baselines.dense import dense_accumulate
from fastagg.bench.baselines.stacking import cat_then_multiply

__all__ = ["dense_svd", "dense_svd_lowrank", "qr_core_svd"]

Factors = tuple[Tensor, Tensor]


def dense_svd(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float], rank: int) -> Factors:
    """FlexLoRA as published: the full weight, its full SVD, truncated."""
    U, S, Vt = torch.linalg.svd(dense_accumulate(As, Bs, c), full_matrices=False)
    return U[:, :rank] * S[:rank], Vt[:rank]


def dense_svd_lowrank(
    As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float], rank: int
) -> Factors:
    """The full weight, then torch.svd_lowrank with its customary oversampling."""
    W = dense_accumulate(As, Bs, c)
    U, S, V = torch.svd_lowrank(W, q=min(rank + 8, *W.shape))
    return U[:, :rank] * S[:rank], V[:, :rank].mT


def qr_core_svd(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float], rank: int) -> Factors:
    """The strong one: torch.cat, two Householder QR, the SVD of the core (NVFlare's HLoRA example, which
    leaves the scaling out)."""
    A, B = cat_then_multiply(As, Bs, c)
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.mT)
    U, S, Vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return (q_b @ U[:, :rank]) * S[:rank], Vt[:rank] @ q_a.mT
