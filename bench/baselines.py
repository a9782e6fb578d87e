"""What users write today, in pure torch, with the scaling right.

Each decomposes one module's sum_k c_k B_k A_k at the largest rank and returns U S (m, r), Vt (r, n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
Decompose = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[float], int], Factors]


def _dense(As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    total = Bs[0].new_zeros((Bs[0].shape[0], As[0].shape[1]), dtype=torch.float32)
    for A, B, weight in zip(As, Bs, c, strict=True):
        total += weight * (B.float() @ A.float())
    return total


def dense_svd(
    As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float], rank: int
) -> Factors:
    """FlexLoRA as published: the full weight, its full SVD, truncated."""
    U, S, Vt = torch.linalg.svd(_dense(As, Bs, c), full_matrices=False)
    return U[:, :rank] * S[:rank], Vt[:rank]


def dense_svd_lowrank(
    As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float], rank: int
) -> Factors:
    """The full weight, then torch.svd_lowrank with its customary oversampling."""
    U, S, V = torch.svd_lowrank(_dense(As, Bs, c), q=rank + 8)
    return U[:, :rank] * S[:rank], V[:, :rank].mT


def qr_core_svd(
    As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float], rank: int
) -> Factors:
    """The strong one: torch.cat, two Householder QR, the SVD of the core (NVFlare's form)."""
    A = torch.cat([weight * A.float() for A, weight in zip(As, c, strict=True)])
    B = torch.cat([B.float() for B in Bs], dim=1)
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.mT)
    U, S, Vt = torch.linalg.svd(r_b @ r_a.mT)
    return (q_b @ U[:, :rank]) * S[:rank], Vt[:rank] @ q_a.mT


def stack_by_loop(
    As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """FLoRA's stack by mul, cast and torch.cat."""
    A = torch.cat([weight * A.float() for A, weight in zip(As, c, strict=True)])
    return A, torch.cat([B.float() for B in Bs], dim=1)


DECOMPOSITIONS: dict[str, Decompose] = {
    "dense + linalg.svd": dense_svd,
    "dense + svd_lowrank": dense_svd_lowrank,
    "cat + 2 QR + core SVD": qr_core_svd,
}
