"""A case's factors, drawn: as an aggregation holds them (flat buffers and tables), and as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fastagg import ops
from fastagg.bench.cases import Case, Projection
from fastagg.dtypes import DTYPE_CODES

__all__ = ["SCALING", "Bucket", "FactorKind", "Module", "Workload", "draw"]

FactorKind = Literal["random", "signal"]
SCALING = 2.0
"""s_k = lora_alpha / r = 2 of every client."""

_DECAY = 16.0  # the signal's singular values fall by e in so many columns
_NOISE = 0.02  # a client's own part beside the shared signal's leading direction


@dataclass(frozen=True)
class Module:
    """One module's factors as a user holds them."""

    As: list[Tensor]
    """K of (r_k, n)."""
    Bs: list[Tensor]
    """K of (m, r_k)."""
    c: list[float]
    """K: p_k s_k."""

    def reference(self) -> tuple[Tensor, Tensor]:
        """[c_k A_k] (R, n) and [B_k] (m, R) in float64: dW = B A."""
        A = torch.cat([c * A.double() for A, c in zip(self.As, self.c, strict=True)])
        return A, torch.cat([B.double() for B in self.Bs], dim=1)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Modules of one shape and the same ranks, in one flat buffer a client."""

    m: int
    n: int
    ranks: tuple[int, ...]
    names: tuple[str, ...]
    """The modules', `layers.0.self_attn.q_proj`, .."""
    flats: list[Tensor]
    """K flat buffers of the factors' dtype: A (r, n), then B (m, r), module after module."""
    shares: tuple[float, ...]
    """K: p_k s_k."""

    @property
    def modules(self) -> int:
        """L."""
        return len(self.names)

    @property
    def rows(self) -> int:
        """R."""
        return sum(self.ranks)

    @property
    def dtype(self) -> torch.dtype:
        """The factors'."""
        return self.flats[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.flats[0].device

    @cached_property
    def slots(self) -> Tensor:
        """`stack`'s table, sorted by module and row."""
        code, size = DTYPE_CODES[self.dtype], self.dtype.itemsize
        table, row = [], 0
        for k, rank in enumerate(self.ranks):
            for module in range(self.modules):
                a = module * rank * (self.m + self.n) * size
                b = a + rank * self.n * size
                table.append([module, row, rank, k, a, code, k, b, code])
            row += rank
        return torch.tensor(sorted(table), dtype=torch.int64).to(self.device)

    @cached_property
    def scale(self) -> Tensor:
        """`stack`'s: p_k s_k of each slot, float64."""
        return torch.tensor(self.shares * self.modules, dtype=torch.float64).to(self.device)

    @cached_property
    def coefficients(self) -> Tensor:
        """The same by row, (L, R) float64."""
        by_row = torch.tensor(self.shares, dtype=torch.float64).repeat_interleave(
            torch.tensor(self.ranks)
        )
        return by_row.expand(self.modules, -1).contiguous().to(self.device)

    @cached_property
    def owners(self) -> Tensor:
        """The client of each row, (L, R) int64."""
        by_row = torch.arange(len(self.ranks)).repeat_interleave(torch.tensor(self.ranks))
        return by_row.expand(self.modules, -1).contiguous().to(self.device)

    def stack(self) -> tuple[Tensor, Tensor]:
        """A (L, R, n) and Bt (L, R, m) in the factors' dtype, as an aggregation keeps them."""
        shape = {"modules": self.modules, "rows": self.rows, "m": self.m, "n": self.n}
        A, Bt, _, _ = ops.stack(self.flats, self.slots, **shape, dtype=self.dtype)  # type: ignore[arg-type]
        return A, Bt

    def module(self, index: int) -> Module:
        """Views of one module's factors."""
        As, Bs = [], []
        for flat, rank in zip(self.flats, self.ranks, strict=True):
            factors = flat.view(self.modules, -1)[index]
            As.append(factors[: rank * self.n].view(rank, self.n))
            Bs.append(factors[rank * self.n :].view(self.m, rank))
        return Module(As, Bs, list(self.shares))

    def first(self, count: int) -> Bucket:
        """Its first modules; nothing is copied."""
        flats = [
            flat[: count * rank * (self.m + self.n)]
            for flat, rank in zip(self.flats, self.ranks, strict=True)
        ]
        return Bucket(self.m, self.n, self.ranks, self.names[:count], flats, self.shares)


@dataclass(frozen=True, eq=False)
class Workload:
    """A case, or some of it, on a device."""

    case: Case
    layers: int
    buckets: tuple[Bucket, ...]

    @property
    def modules(self) -> int:
        """How many are here; the case may have more."""
        return sum(bucket.modules for bucket in self.buckets)

    @property
    def rank(self) -> int:
        """r of the decompositions: the largest client's."""
        return self.case.rank

    @property
    def nbytes(self) -> int:
        """Of all factors."""
        return sum(flat.nbytes for bucket in self.buckets for flat in bucket.flats)

    @property
    def dtype(self) -> torch.dtype:
        """The factors'."""
        return self.buckets[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.buckets[0].device

    def by_module(self) -> list[Module]:
        """All modules' factors as tensors, bucket by bucket."""
        return [bucket.module(index) for bucket in self.buckets for index in range(bucket.modules)]

    def first_layers(self, count: int) -> Workload:
        """The first layers; nothing is copied."""
        buckets = tuple(b.first(b.modules * count // self.layers) for b in self.buckets)
        return Workload(self.case, count, buckets)

    def smallest(self) -> Workload:
        """One module alone, of the smallest shape."""
        bucket = min(self.buckets, key=lambda b: b.m * b.n * min(b.m, b.n))
        return Workload(self.case, 1, (bucket.first(1),))


def draw(
    case: Case,
    *,
    layers: int,
    dtype: torch.dtype,
    factors: FactorKind,
    seed: int,
    device: torch.device,
) -> Workload:
    """Fresh factors of a case's first `layers` layers.

    random: Gaussian entries, the hard case (a flat spectrum). signal: the clients share a product whose
    singular values decay exponentially, and each adds noise of its own, as adapters that learn from
    related data do.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shares = torch.linspace(1.0, 2.0, case.clients, dtype=torch.float64)
    weights = tuple((SCALING * shares / shares.sum()).tolist())
    groups: dict[tuple[int, int, tuple[int, ...]], list[Projection]] = {}
    for projection in case.projections:
        groups.setdefault((projection.m, projection.n, projection.ranks), []).append(projection)
    buckets = []
    for (m, n, ranks), projections in groups.items():
        # Layer by layer, so that the first modules are those of the first layers.
        names = tuple(f"layers.{layer}.{p.name}" for layer in range(layers) for p in projections)
        flats = _random if factors == "random" else _with_signal
        drawn = flats(ranks, len(names), m, n, dtype, generator)
        buckets.append(Bucket(m, n, ranks, names, drawn, weights))
    return Workload(case, layers, tuple(buckets))


def _random(
    ranks: Sequence[int], modules: int, m: int, n: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    flats = []
    for rank in ranks:
        flat = torch.empty(modules, rank * (m + n), dtype=dtype, device=generator.device)
        for module in flat:  # one module in float32 at a time
            values = torch.randn(rank * (m + n), generator=generator, device=generator.device)
            module[: rank * n] = values[: rank * n] / n**0.5
            module[rank * n :] = values[rank * n :] / rank**0.5
        flats.append(flat.view(-1))
    return flats


def _with_signal(
    ranks: Sequence[int], modules: int, m: int, n: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    largest = max(ranks)
    decay = torch.exp(-torch.arange(largest, device=generator.device) / (2 * _DECAY))
    flats = [
        torch.empty(modules, rank * (m + n), dtype=dtype, device=generator.device) for rank in ranks
    ]
    for l in range(modules):  # noqa: E741 - the field's name for a module
        right = torch.randn(largest, n, generator=generator, device=generator.device)
        left = torch.randn(m, largest, generator=generator, device=generator.device)
        for rank, flat in zip(ranks, flats, strict=True):
            noise = torch.randn(rank * (m + n), generator=generator, device=generator.device)
            a = decay[:rank, None] * right[:rank] + _NOISE * noise[: rank * n].view(rank, n)
            b = left[:, :rank] * decay[:rank] + _NOISE * noise[rank * n :].view(m, rank)
            flat[l, : rank * n] = (a / n**0.5).reshape(-1)
            flat[l, rank * n :] = (b / m**0.5).reshape(-1)
    return [flat.view(-1) for flat in flats]
