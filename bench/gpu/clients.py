"""Clients' factors on the device, as an aggregation holds them: flat buffers and tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BF16 = 1  # the dtype's code in the tables


@dataclass(frozen=True)
class Clients:
    """K clients of one bucket: `modules` modules of size x size."""

    ranks: tuple[int, ...]
    modules: int
    size: int
    flats: list[Tensor]
    """One flat bf16 buffer a client: A (r, size), then B (size, r), module after module."""
    slots: Tensor
    """int64 (modules x K, 9): `stack`'s table, sorted by module and row."""
    weights: tuple[float, ...]
    """K: p_k s_k, on the host."""
    scale: Tensor
    """float64 (modules x K): p_k s_k of each slot."""
    coefficients: Tensor
    """float64 (modules, R): the same by row."""

    @property
    def rows(self) -> int:
        """R."""
        return sum(self.ranks)

    def factors(self, module: int) -> tuple[list[Tensor], list[Tensor]]:
        """The clients' A and B of one module as tensors, as a user holds them."""
        As, Bs = [], []
        for flat, rank in zip(self.flats, self.ranks, strict=True):
            a, b = flat.view(self.modules, 2, rank * self.size)[module]
            As.append(a.view(rank, self.size))
            Bs.append(b.view(self.size, rank))
        return As, Bs

    def handout(self) -> tuple[Tensor, Tensor, list[int]]:
        """`redistribute`'s table, scalings and sizes: every client's next factors, at its own rank."""
        rows = []
        for k, rank in enumerate(self.ranks):
            for module in range(self.modules):
                offset = module * rank * 2 * self.size * 2
                rows.append([module, rank, k, offset, BF16, offset + rank * self.size * 2, BF16])
        device = self.flats[0].device
        scalings = torch.full((len(rows),), 2.0, dtype=torch.float64, device=device)
        sizes = [flat.numel() * flat.element_size() for flat in self.flats]
        return torch.tensor(rows, device=device), scalings, sizes


def gaussian(ranks: tuple[int, ...], modules: int, size: int, device: torch.device) -> Clients:
    """Gaussian factors, the hard case (a flat spectrum); alpha = 2r and unequal example counts."""
    flats, table, row = [], [], 0
    shares = torch.linspace(1.0, 2.0, len(ranks), dtype=torch.float64)
    shares = 2.0 * shares / shares.sum()
    for k, rank in enumerate(ranks):
        flat = torch.randn(modules * rank * 2 * size, device=device) / size**0.5
        flats.append(flat.bfloat16())
        for module in range(modules):
            offset = module * rank * 2 * size * 2
            table.append([module, row, rank, k, offset, BF16, k, offset + rank * size * 2, BF16])
        row += rank
    table.sort()
    by_row = shares.repeat_interleave(torch.tensor(ranks))
    scale = shares.repeat(modules)
    return Clients(
        ranks,
        modules,
        size,
        flats,
        torch.tensor(table, device=device),
        tuple(shares.tolist()),
        scale.to(device),
        by_row.expand(modules, -1).contiguous().to(device),
    )
