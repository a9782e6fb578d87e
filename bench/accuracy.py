"""Errors measured honestly: in float64, through a QR of the factors, never as the difference of two
large numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def excess_error(
    As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float], left: Tensor, right: Tensor
) -> float:
    """(error - optimal error) / |dW|_F of left (m, r) right (r, n) as an approximation of dW.

    The residual is [B, -left] [A; right], whose norm is that of the small product of the triangular
    factors; the optimum is the tail of the exact singular values.
    """
    A = torch.cat([weight * A.double() for A, weight in zip(As, c, strict=True)])
    B = torch.cat([B.double() for B in Bs], dim=1)
    core = torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT
    singular = torch.linalg.svdvals(core)
    optimal = float(singular[right.shape[0] :].norm())
    wide = torch.linalg.qr(torch.cat([B, -left.double()], dim=1))[1]
    tall = torch.linalg.qr(torch.cat([A, right.double()]).mT)[1]
    error = float((wide @ tall.mT).norm())
    return (error - optimal) / float(singular.norm())
