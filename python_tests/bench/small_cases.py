"""Cases of a few hundred numbers with all that a case may have, and their equation in float64."""

from __future__ import annotations

import torch

from fastagg.bench.cases import Case, Projection
from fastagg.bench.workload import FactorKind, Module, Workload, draw

CPU = torch.device("cpu")

UNEVEN = Case(
    "uneven",
    "two shapes, two of their projections in one bucket, ranks that differ between projections",
    2,
    (
        Projection("self_attn.q_proj", 24, 16, (6, 3, 1)),
        Projection("mlp.up_proj", 40, 24, (4, 3, 2)),
        Projection("self_attn.k_proj", 24, 16, (6, 3, 1)),
    ),
)
MANY_ROWS = Case(
    "many-rows",
    "more rows than columns, a first client that is not the largest, two clients of one rank",
    2,
    (
        Projection("self_attn.q_proj", 24, 16, (2, 9, 6, 7, 2)),
        Projection("mlp.up_proj", 40, 24, (3, 9, 7, 8, 3)),
    ),
)


def drawn(
    case: Case,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    factors: FactorKind = "random",
    layers: int | None = None,
) -> Workload:
    layers = case.layers if layers is None else layers
    return draw(case, layers=layers, dtype=dtype, factors=factors, seed=seed, device=CPU)


def updates(module: Module) -> list[torch.Tensor]:
    """p_k s_k B_k A_k of each client in float64."""
    factors = zip(module.As, module.Bs, module.c, strict=True)
    return [c * (B.double() @ A.double()) for A, B, c in factors]


def dense(module: Module) -> torch.Tensor:
    """dW in float64."""
    return torch.stack(updates(module)).sum(0)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact|, for dense matrices of one shape."""
    assert found.shape == exact.shape
    return float(torch.linalg.norm(found.double() - exact) / torch.linalg.norm(exact))


def tail(matrix: torch.Tensor, rank: int) -> float:
    """The least distance of a matrix of this rank (Eckart and Young)."""
    return float(torch.linalg.svdvals(matrix)[rank:].norm())
