"""FLoRA's stack, [p_k s_k A_k] and [B_k] in float32, from lists of factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["cat_then_multiply", "client_by_client"]

Stack = tuple[Tensor, Tensor]
"""A (R, n) and B (m, R)."""


def client_by_client(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]) -> Stack:
    """Every client's factors cast and multiplied, then torch.cat: FLoRA's published form, but for its
    torch.cat inside of the loop."""
    A = torch.cat([weight * A.float() for A, weight in zip(As, c, strict=True)])
    return A, torch.cat([B.float() for B in Bs], dim=1)


def cat_then_multiply(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]) -> Stack:
    """torch.cat first, then one cast and one multiply by the rows' coefficients."""
    rows = [weight for A, weight in zip(As, c, strict=True) for _ in range(A.shape[0])]
    column = torch.tensor(rows, dtype=torch.float32, device=As[0].device)[:, None]
    return torch.cat(list(As)).float() * column, torch.cat(list(Bs), dim=1).float()
