"""<dW_i, dW_j> of the clients' updates p_k s_k B_k A_k, (K, K)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastagg.bench.baselines.stacking import cat_then_multiply

__all__ = ["dense_inner_products", "factored_inner_products", "pairwise_traces"]


def dense_inner_products(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    """Every update dense and flattened, as robust aggregators take them. Holds K m n entries."""
    parts = zip(As, Bs, c, strict=True)
    updates = torch.stack([(weight * (B.float() @ A.float())).flatten() for A, B, weight in parts])
    return updates @ updates.mT


def pairwise_traces(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    """tr((B_i^T B_j) (A_j A_i^T)), a pair of clients at a time."""
    weighted = [weight * A.float() for A, weight in zip(As, c, strict=True)]
    wide = [B.float() for B in Bs]
    result = torch.empty(len(As), len(As), device=As[0].device)
    for i in range(len(As)):
        for j in range(i + 1):
            product = (wide[i].mT @ wide[j]) * (weighted[i] @ weighted[j].mT)
            result[i, j] = result[j, i] = product.sum()
    return result


def factored_inner_products(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    """Both Gram matrices of the stack, multiplied entry by entry and summed by blocks."""
    A, B = cat_then_multiply(As, Bs, c)
    product = (B.mT @ B) * (A @ A.mT)
    owners = torch.arange(len(As), device=A.device)
    owners = owners.repeat_interleave(torch.tensor([a.shape[0] for a in As], device=A.device))
    rows = torch.zeros(len(As), A.shape[0], device=A.device).index_add_(0, owners, product)
    return torch.zeros(len(As), len(As), device=A.device).index_add_(1, owners, rows)
