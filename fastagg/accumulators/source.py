"""What a finished accumulator gives to a hand-out: the aggregate, some modules at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fastagg import ops
from fastagg.devices import pinned, uploaded
from fastagg.errors import InvalidInput
from fastagg.planning.plan import BucketPlan, ModuleIndex

__all__ = ["Chunk", "Source", "WholeAverages", "launch_stack", "refuse_nonfinite", "stack_part"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """The aggregate of L modules of one shape: ``dW = B diag(c) A``, or dW itself.

    Attributes:
        modules: their names.
        ranks: (L,) int64, R_j: rows of the slabs that a client fills; 0 where dW itself is held.
        a, bt: slabs (L, rows, n) and (L, rows, m) of one dtype; None where dW itself is held.
        coefficients: (L, rows) float64; None means 1.
        dense: (L, m, n) float32; None where the slabs are held.
    """

    modules: tuple[str, ...]
    m: int
    n: int
    ranks: np.ndarray[Any, np.dtype[np.int64]]
    a: torch.Tensor | None = None
    bt: torch.Tensor | None = None
    coefficients: torch.Tensor | None = None
    dense: torch.Tensor | None = None

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two slabs."""
        assert self.a is not None
        assert self.bt is not None
        return self.a, self.bt

    def norm(self, place: int) -> float:
        """|dW|_F of one module, in float64."""
        if self.dense is not None:
            return float(torch.linalg.vector_norm(self.dense[place], dtype=torch.float64))
        a, b = self.exact_factors(place)
        return float(((a @ a.mT) * (b.mT @ b)).sum().clamp(min=0).sqrt())

    def exact_factors(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, n) and B (m, R) of one module in float64, dW = B A; not where dW itself is held.

        The coefficients are multiplied into A: in float32 that could overflow where dW does not.
        """
        rows = int(self.ranks[place])
        a, bt = (slab[place, :rows].double() for slab in self.factors)
        if self.coefficients is not None:
            a = self.coefficients[place, :rows, None] * a
        return a, bt.mT

    def add_to(self, place: int, matrix: torch.Tensor, *, transposed: bool) -> None:
        """Adds dW of one module into an (m, n) matrix in place, or its transpose into an (n, m) one.

        The sum is taken in float32 (float64 for a float64 matrix) and rounded once.
        """
        if self.dense is not None:
            delta = self.dense[place].to(matrix.device)
            matrix.add_(delta.mT if transposed else delta)
            return
        if matrix.dtype == torch.float64:
            a, b = (factor.to(matrix.device) for factor in self.exact_factors(place))
            matrix.addmm_(*((a.mT, b.mT) if transposed else (b, a)))
            return
        a, bt = (slab[place : place + 1].to(matrix.device) for slab in self.factors)
        coefficients = self.coefficients
        if coefficients is not None:
            coefficients = coefficients[place : place + 1].to(matrix.device)
        # (B diag(c) A)^T = A^T diag(c) B^T: the same product with the slabs' parts swapped.
        left, right = (a, bt) if transposed else (bt, a)
        ops.reconstruct_(matrix.unsqueeze(0), right, left, coefficients)


def stack_part(
    plan: BucketPlan,
    lo: int,
    hi: int,
    flats: Sequence[torch.Tensor],
    dtype: torch.dtype,
    clients: Sequence[str],
    *,
    scaled: bool = False,
) -> Chunk:
    """Stacks the factors that a plan places, for its modules lo .. hi - 1.

    Args:
        flats, clients: the buffers that the plan's slots count, and whose they are.
        dtype: of the slabs.
        scaled: multiply the coefficients into A instead of leaving them beside it.

    Raises:
        InvalidInput: NaN or infinity.
    """
    chunk, nonfinite = launch_stack(plan, lo, hi, flats, dtype, scaled=scaled)
    refuse_nonfinite(nonfinite, plan, lo, hi, clients)
    return chunk


def launch_stack(
    plan: BucketPlan,
    lo: int,
    hi: int,
    flats: Sequence[torch.Tensor],
    dtype: torch.dtype,
    *,
    scaled: bool = False,
) -> tuple[Chunk, torch.Tensor]:
    """:func:`stack_part` that does not wait for the device, and the non-finite counts of each slot."""
    part, shape, device = plan.part(lo, hi), plan.bucket, flats[0].device
    a, bt, nonfinite, _ = ops.stack(
        list(flats),
        pinned(part.slots_tensor, device),
        pinned(torch.from_numpy(part.scale), device) if scaled else None,
        modules=hi - lo,
        rows=part.rows,
        m=shape.m,
        n=shape.n,
        dtype=dtype,
    )
    coefficients = None if scaled else uploaded(part.coefficients, device)
    chunk = Chunk(shape.modules[lo:hi], shape.m, shape.n, part.ranks, a, bt, coefficients)
    return chunk, nonfinite


def refuse_nonfinite(
    nonfinite: torch.Tensor, plan: BucketPlan, lo: int, hi: int, clients: Sequence[str]
) -> None:
    """Waits for the counts of :func:`launch_stack` and refuses what is not finite.

    Raises:
        InvalidInput: NaN or infinity.
    """
    if bool(nonfinite.any()):
        # Every client was checked when it was added: its buffer was changed since, or the product
        # of its weight, scaling and factor left the range of float32.
        slot = plan.part(lo, hi).slots[int(torch.nonzero(nonfinite.sum(1))[0])]
        raise InvalidInput(
            "the factors are not finite any more",
            client=clients[int(slot[3])],
            module=plan.bucket.modules[lo + int(slot[0])],
            expected="finite values below 3.4e38, also when scaled",
            cure="Leave this client out, or scale its adapter down",
        )


class WholeAverages(Protocol):
    """The weighted averages of the tensors that are no factors."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Their keys, sorted."""

    def total(self, key: str) -> float:
        """The sum of the weights of those that have a tensor."""

    def blocks(self, key: str) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The average of one tensor, flattened, as (begin, end, values) some elements at a time.

        The values are on the host.
        """


class Source(Protocol):
    """A finished accumulator."""

    @property
    def kind(self) -> str:
        """ "stack", "dense" or "means"."""

    @property
    def device(self) -> torch.device:
        """Where it is held, and handed out from."""

    @property
    def index(self) -> ModuleIndex:
        """The modules, in buckets."""

    @property
    def whole(self) -> WholeAverages:
        """The averages of the tensors that are no factors."""

    @property
    def discarded(self) -> Mapping[str, float]:
        """Module -> upper bound of |dW of the clients' own adapters - dW|_F; none where that is 0."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""

    def rows(self, bucket: int) -> list[int]:
        """Rows of the slabs of each module of a bucket; 0 where dW itself is held."""

    def itemsize(self, bucket: int) -> int:
        """Bytes of a number of a bucket's slabs."""

    def load(self, bucket: int, lo: int, hi: int) -> Chunk:
        """The aggregate of the modules lo .. hi - 1 of a bucket."""

    def stacked(self, bucket: int, lo: int, hi: int) -> Chunk:
        """The same with the coefficients multiplied into A, in float32.

        Raises:
            InvalidInput: the accumulator does not keep the clients' factors apart.
        """
