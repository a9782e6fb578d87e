"""Running sums per module, allocated as modules turn up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from fastagg.accumulators.held import Held
from fastagg.accumulators.source import Chunk, launch_stack, refuse_nonfinite
from fastagg.errors import InvalidInput
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
        self._nonfinite: torch.Tensor | None = None
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
        members: Sequence[Member] | Sequence[Held],
        flats: Sequence[torch.Tensor],
        scales: Sequence[Float64Array],
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[int, int, int, Chunk]]:
        """The stacks of some clients as (block, lo, hi, chunk), over the modules that they have.

        To look for NaN at once would be to wait for a GPU once a chunk, and to end its overlap with the
        next client's copy: there the counts are added up, for :meth:`check_finite` to look at.

        Args:
            dtype: of the slabs; None: the factors' own where they have one in common.

        Raises:
            InvalidInput: NaN or infinity, on a CPU.
        """
        clients = [member.client for member in members]
        layouts = [member.layout for member in members]
        own = dtype or promoted(layout.dtype for layout in layouts)
        for block, plan in enumerate(self.index.plan(layouts, scales)):
            for lo, hi in plan.runs(self._limit, own.itemsize):
                chunk, nonfinite = launch_stack(plan, lo, hi, flats, own)
                if nonfinite.is_cpu:
                    refuse_nonfinite(nonfinite, plan, lo, hi, clients)
                else:
                    found = nonfinite.sum()
                    self._nonfinite = found if self._nonfinite is None else self._nonfinite + found
                yield block, lo, hi, chunk

    def check_finite(self) -> None:
        """Waits for the device and refuses sums that NaN or infinity went into.

        Each client was checked on the host when it was added, so this is rare.

        Raises:
            InvalidInput: there was such a client.
        """
        if self._nonfinite is not None and int(self._nonfinite):
            raise InvalidInput(
                "the factors of a client were not finite any more when they were added",
                expected="finite values",
                got=f"{int(self._nonfinite)} that are NaN or infinite",
                cure="Leave the buffers of an update alone once it was made; start the round again",
            )
