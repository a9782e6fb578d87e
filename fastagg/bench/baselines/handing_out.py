"""FlexLoRA's hand-out: A = Vt[:r_k], B = U[:, :r_k] S[:r_k] / s_k in each client's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["slice_by_client", "slice_by_rank"]

Handouts = list[tuple[Tensor, Tensor]]
"""A client's A (r_k, n) and B (m, r_k), client by client."""


def slice_by_client(
    U: Tensor, S: Tensor, Vt: Tensor, ranks: Sequence[int], scaling: float, dtype: torch.dtype
) -> Handouts:
    """Every client's factors are sliced, scaled and cast anew: FlexLoRA's published form."""
    return [
        (
            Vt[:rank].to(dtype, copy=True).contiguous(),
            (U[:, :rank] * S[:rank] / scaling).to(dtype).contiguous(),
        )
        for rank in ranks
    ]


def slice_by_rank(
    U: Tensor, S: Tensor, Vt: Tensor, ranks: Sequence[int], scaling: float, dtype: torch.dtype
) -> Handouts:
    """Scaled and cast once, sliced for each distinct rank, and copied for each client."""
    left, right = (U * S / scaling).to(dtype), Vt.to(dtype)
    by_rank = {rank: (right[:rank].contiguous(), left[:, :rank].contiguous()) for rank in set(ranks)}
    return [(by_rank[rank][0].clone(), by_rank[rank][1].clone()) for rank in ranks]
