"""How far a factored result U S Vt is from dW = B diag(c) A, never forming a large difference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def balanced(A: Tensor, B: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """A and B diag(c) in float64, each column of B as long as its row of A within a factor of two.

    Powers of two are exact: the product does not change, whatever the gauge of the factors.
    """
    A, B = A.double(), B.double()
    if c is not None:
        # Half of c on either side: a large coefficient may stand for a small factor.
        B = B * c.double()
    lengths = A.norm(dim=1) / B.norm(dim=0)
    usable = torch.isfinite(lengths) & (lengths > 0)
    exponent = torch.where(usable, torch.round(torch.log2(lengths) / 2), 0.0)
    return A * torch.exp2(-exponent)[:, None], B * torch.exp2(exponent)


def core(A: Tensor, B: Tensor) -> Tensor:
    """The small matrix with the singular values of B A."""
    return torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT


@dataclass(frozen=True)
class Reference:
    """One module's dW (A (R, n), B (m, R), c (R,) or None) in float64."""

    A: Tensor
    B: Tensor
    sigma: Tensor
    """The singular values, falling, min(m, n, R) of them."""
    terms: float
    """The norm of the rows' terms c_r b_r a_r^T: the scale of rounding where they cancel."""

    @classmethod
    def of(cls, A: Tensor, B: Tensor, c: Tensor | None) -> Reference:
        a, b = balanced(A, B, c)
        terms = float((a.norm(dim=1) * b.norm(dim=0)).norm())
        return cls(a, b, torch.linalg.svdvals(core(a, b)), terms)

    @property
    def norm(self) -> float:
        return float(self.sigma.norm())

    def optimal(self, rank: int) -> float:
        """The smallest error that a matrix of this rank can have (Eckart and Young)."""
        return float(self.sigma[rank:].norm())

    def leading(self, rank: int) -> Tensor:
        padded = torch.zeros(rank, dtype=torch.float64)
        padded[: min(rank, len(self.sigma))] = self.sigma[:rank]
        return padded

    def error(self, U: Tensor, S: Tensor, Vt: Tensor) -> float:
        """|dW - U diag(S) Vt|_F, by the QR of [B, -U S] and of [A; Vt]."""
        root = S.double().sqrt()
        left = torch.cat([self.B, -U.double() * root], 1)
        right = torch.cat([self.A, Vt.double() * root[:, None]])
        return float(core(right, left).norm())


def loss_of_orthogonality(U: Tensor, S: Tensor, Vt: Tensor) -> float:
    """The largest entry of U^T U - I and V^T V - I, over the columns that carry weight."""
    live = S > 0
    worst = 0.0
    for vectors in (U.double().mT[live], Vt.double()[live]):
        gram = vectors @ vectors.mT
        gram.diagonal().sub_(1)
        worst = max(worst, float(gram.abs().amax()) if gram.numel() else 0.0)
    return worst


def dead_columns_are_zero(U: Tensor, S: Tensor, Vt: Tensor) -> bool:
    dead = S <= 0
    return not (bool(U.mT[dead].any()) or bool(Vt[dead].any()) or bool(S[dead].any()))


def signs_are_fixed(U: Tensor, S: Tensor) -> bool:
    """The entry of each column that is largest in magnitude, the first of them, is positive."""
    live = U.mT[S > 0]
    largest = live.gather(1, live.abs().argmax(1, keepdim=True))
    return bool((largest > 0).all())
