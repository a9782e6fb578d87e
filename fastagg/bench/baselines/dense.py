"""dW = sum_k p_k s_k B_k A_k as a dense matrix, and into a base weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastagg.bench.baselines.stacking import cat_then_multiply

__all__ = ["cat_then_product", "dense_accumulate", "merge_client_by_client", "merge_product"]


def dense_accumulate(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    """dW client by client: FlexLoRA's published form."""
    W = torch.zeros(Bs[0].shape[0], As[0].shape[1], dtype=torch.float32, device=As[0].device)
    for A, B, weight in zip(As, Bs, c, strict=True):
        W += weight * (B.float() @ A.float())
    return W


def cat_then_product(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    """The stack, then one product."""
    A, B = cat_then_multiply(As, Bs, c)
    return B @ A


def merge_client_by_client(
    W: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]
) -> Tensor:
    """dW client by client, then W += dW in W's dtype. Returns W."""
    W += dense_accumulate(As, Bs, c).to(W.dtype)
    return W


def merge_product(
    W: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]
) -> Tensor:
    """The stack, one product, then W += dW in W's dtype. Returns W."""
    W += cat_then_product(As, Bs, c).to(W.dtype)
    return W
