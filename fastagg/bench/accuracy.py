"""Errors measured honestly: in float64, through a QR of the factors, never as the difference of two
large numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastagg.bench.contender import Accuracy
from fastagg.bench.workload import Module

__all__ = ["of_approximation", "relative_error"]

_LIVE = 1e-5  # of the largest: a column below has no direction to speak of in float32


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact|_F / |exact|_F."""
    norm = float(exact.double().norm()) or 1.0
    return float((found.double() - exact.double()).norm()) / norm


def of_approximation(module: Module, left: Tensor, right: Tensor) -> Accuracy:
    """(error - optimal error) / |dW|_F of left (m, r) right (r, n) as a rank-r approximation of dW.

    The residual is [B, -left] [A; right], whose norm is that of the small product of the triangular
    factors; the optimum is the tail of the exact singular values.
    """
    A, B = module.reference()
    left, right = left.to(B), right.to(A)
    core = torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT
    singular = torch.linalg.svdvals(core)
    optimal = float(singular[right.shape[0] :].norm())
    wide = torch.linalg.qr(torch.cat([B, -left], dim=1))[1]
    tall = torch.linalg.qr(torch.cat([A, right]).mT)[1]
    error = float((wide @ tall.mT).norm())
    norm = float(singular.norm()) or 1.0
    loss = max(_loss_of_orthogonality(left), _loss_of_orthogonality(right.mT))
    return Accuracy((error - optimal) / norm, loss)


def _loss_of_orthogonality(vectors: Tensor) -> float:
    """The largest entry of |V^T V - I| after each column is scaled to length 1."""
    lengths = vectors.norm(dim=0)
    live = vectors[:, lengths > _LIVE * lengths.max()]
    unit = live / live.norm(dim=0)
    if unit.shape[1] == 0:
        return 0.0
    return float((unit.mT @ unit - torch.eye(unit.shape[1]).to(unit)).abs().max())
