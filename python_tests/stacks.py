"""Random buckets: clients' factors in flat buffers, the plan that addresses them, and their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = tuple(CODES)


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=rng).to(dtype)


def integer(rng: torch.Generator, low: int, high: int) -> int:
    """A random number in low .. high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


@dataclass
class FlatWriter:
    """A flat buffer in the making: every tensor lies behind `gap` bytes, so at any alignment."""

    parts: list[Tensor] = field(default_factory=list)
    size: int = 0

    def add(self, tensor: Tensor, gap: int) -> int:
        offset = self.size + gap
        # What lies between two tensors must never be read: it would be seen as a NaN.
        self.parts += [torch.full((gap,), 255, dtype=torch.uint8), bytes_of(tensor)]
        self.size = offset + self.parts[-1].numel()
        return offset

    def flat(self) -> Tensor:
        return torch.cat([torch.empty(0, dtype=torch.uint8), *self.parts])


@dataclass
class Bucket:
    """K clients' factors of L modules of one shape; a client may lack a module."""

    modules: int
    rows: int
    m: int
    n: int
    flats: list[Tensor]
    slots: Tensor
    factors: list[tuple[int, int, Tensor, Tensor]]
    """module, first row, A (r, n), B (m, r)"""

    def sizes(self) -> dict[str, int]:
        return {"modules": self.modules, "rows": self.rows, "m": self.m, "n": self.n}

    def slabs(self, scale: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
        """The equation in float64: A (L, R, n) with rows scaled, Bt (L, R, m)."""
        A = torch.zeros(self.modules, self.rows, self.n, dtype=torch.float64)
        Bt = torch.zeros(self.modules, self.rows, self.m, dtype=torch.float64)
        for i, (module, row, a, b) in enumerate(self.factors):
            A[module, row : row + a.shape[0]] = a.double() * (scale[i] if scale else 1.0)
            Bt[module, row : row + a.shape[0]] = b.double().mT
        return A, Bt


def random_bucket(
    rng: torch.Generator,
    *,
    ranks: Sequence[int],
    modules: int = 2,
    m: int = 9,
    n: int = 7,
    dtypes: Sequence[torch.dtype] = DTYPES,
    aligned: bool = False,
    lacking: float = 0.0,
    padding: int = 0,
) -> Bucket:
    """`ranks` of K clients, whose factors have random dtypes of `dtypes` and odd byte offsets."""
    used = [0] * modules
    slots, flats, factors = [], [], []
    for k, rank in enumerate(ranks):
        writer = FlatWriter()
        for module in range(modules):
            if float(torch.rand((), generator=rng)) < lacking:
                continue
            a_dtype, b_dtype = (dtypes[integer(rng, 0, len(dtypes) - 1)] for _ in range(2))
            a, b = normal(rng, rank, n, dtype=a_dtype), normal(rng, m, rank, dtype=b_dtype)
            gaps = (0, 0) if aligned else (integer(rng, 0, 3), integer(rng, 0, 3))
            a_offset, b_offset = writer.add(a, gaps[0]), writer.add(b, gaps[1])
            row = used[module]
            slots.append(
                [module, row, rank, k, a_offset, CODES[a_dtype], k, b_offset, CODES[b_dtype]]
            )
            factors.append((module, row, a, b))
            used[module] += rank
        flats.append(writer.flat())
    return Bucket(
        modules,
        max(used, default=0) + padding,
        m,
        n,
        flats,
        torch.tensor(slots, dtype=torch.int64).reshape(-1, 9),
        factors,
    )


def random_stack(
    rng: torch.Generator,
    modules: int,
    rows: int,
    m: int,
    n: int,
    dtype: torch.dtype = torch.float32,
    bt_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A (L, R, n) and Bt (L, R, m)."""
    bt = normal(rng, modules, rows, m, dtype=dtype if bt_dtype is None else bt_dtype)
    return normal(rng, modules, rows, n, dtype=dtype), bt


def product(A: Tensor, Bt: Tensor, c: Tensor | None = None) -> Tensor:
    """dW (L, m, n) = sum_r c_r Bt_r^T A_r in float64."""
    left = Bt.double() if c is None else Bt.double() * c.double()[..., None]
    return left.mT @ A.double()
