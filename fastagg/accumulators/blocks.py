"""Running sums per module, allocated as modules turn up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from fastagg.accumulators.source import Chunk, stack_part
from fastagg.peft_format.layout import promoted
from fastagg.planning.plan import Bucket, ModuleIndex
from fastagg.planning.roster import Float64Array, Member

__all__ = ["Blocks"]

T = TypeVar("T")


class Blocks(Generic[T]):
    """Buckets of modules, each with its sums: modules that came together stay together.

    Args:
        allocate: makes the sums of a bucket.
        limit: bytes that the slabs of the clients being added may take at a time.
    """

    def __init__(self, allocate: Callable[[Bucket], T], limit: int) -> None:
        self.buckets: list[Bucket] = []
        self.sums: list[T] = []
        self.index = ModuleIndex([])
        self._allocate = allocate
        self._limit = limit

    def make_room(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Allocates the sums of those modules, given by (m, n), that have none yet."""
        new = {name: shape for name, shape in shapes.items() if name not in self.index.number}
        for bucket in ModuleIndex.of(new).buckets:
            self.append(bucket, self._allocate(bucket))

    def append(self, bucket: Bucket, sums: T) -> None:
        """Adds a block."""
        self.buckets.append(bucket)
        self.sums.append(sums)
        self.index = ModuleIndex(self.buckets)

    def stacks(
        self,
        members: Sequence[Member],
        flats: Sequence[torch.Tensor],
        scales: Sequence[Float64Array],
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[int, int, int, Chunk]]:
        """The stacks of some clients as (block, lo, hi, chunk), over the modules that they have.

        Args:
            dtype: of the slabs; None: the factors' own where they have one in common.

        Raises:
            InvalidInput: NaN or infinity.
        """
        clients = [member.client for member in members]
        layouts = [member.layout for member in members]
        own = dtype or promoted(layout.dtype for layout in layouts)
        for block, plan in enumerate(self.index.plan(layouts, scales)):
            for lo, hi in plan.runs(self._limit, own.itemsize):
                yield block, lo, hi, stack_part(plan, lo, hi, flats, own, clients)
