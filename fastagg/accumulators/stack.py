"""The stack accumulator: every client's factors as they came; exact, and it grows with the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastagg.accumulators.source import Chunk, stack_part
from fastagg.accumulators.staging import Staging
from fastagg.accumulators.weights import check_totals
from fastagg.accumulators.whole import HeldWhole
from fastagg.peft_format.layout import Slot, promoted
from fastagg.planning.plan import ModuleIndex, WeightTotals, padded
from fastagg.planning.roster import Float64Array, Member, Roster

__all__ = ["StackAccumulator", "StackSource"]


class StackAccumulator:
    """A copy of each client's flat buffer; nothing is computed before the end.

    Sums are taken at the end, over the clients sorted by id: the result has the same bits whatever
    the order of arrival. Memory: the bytes of the adapters.
    """

    kind = "stack"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.staging = Staging(device)
        self.flats: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(flat.numel() for flat in self.flats.values())

    def add(self, members: Sequence[Member], flats: Sequence[torch.Tensor]) -> None:
        """Copies the clients' buffers: all of them or none."""
        self.flats.update(
            {
                member.client: self._copied(flat)
                for member, flat in zip(members, flats, strict=True)
            }
        )

    def merge(self, other: StackAccumulator) -> None:
        """Takes the clients of another stack in; their buffers, which never change, are shared."""
        self.flats.update(
            {name: self.staging.bring(flat) for name, flat in other.flats.items()}
        )

    def discard(self, members: Sequence[Member]) -> None:
        """Lets the buffers of clients go that were not admitted after all."""
        for member in members:
            self.flats.pop(member.client, None)

    def finish(self, roster: Roster, missing: str) -> StackSource:
        """The aggregate of the roster's members.

        Raises:
            InvalidInput: weights that leave a module without an average.
        """
        members = roster.sorted()
        totals = WeightTotals(missing)
        for member in members:
            totals.add(member)
        check_totals(totals)
        slots = {module: slot for module, (slot, _) in roster.slots.items()}
        return StackSource(members, self.flats, slots, totals, self.device)

    def _copied(self, flat: torch.Tensor) -> torch.Tensor:
        brought = self.staging.bring(flat)
        return brought.clone() if brought is flat else brought


class StackSource:
    """The stack of all clients, built from their buffers some modules at a time."""

    kind = "stack"

    def __init__(
        self,
        members: Sequence[Member],
        flats: dict[str, torch.Tensor],
        slots: dict[str, Slot],
        totals: WeightTotals,
        device: torch.device,
    ) -> None:
        self.device = device
        self.index = ModuleIndex.of({name: (slot.m, slot.n) for name, slot in slots.items()})
        self._members = members
        self._clients = [member.client for member in members]
        self._flats = [flats[client] for client in self._clients]
        self._plans = self.index.plan(
            [member.layout for member in members],
            [self._scales(member, totals) for member in members],
        )
        self._dtypes = [self._common_dtype((bucket.m, bucket.n)) for bucket in self.index.buckets]
        self.whole = HeldWhole(members, flats, device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(flat.numel() for flat in self._flats)

    def rows(self, bucket: int) -> list[int]:
        """Rows of each module's slabs."""
        return [padded(rank) for rank in self._plans[bucket].ranks.tolist()]

    def itemsize(self, bucket: int) -> int:
        """Bytes of a number of a bucket's slabs."""
        return self._dtypes[bucket].itemsize

    def load(self, bucket: int, lo: int, hi: int) -> Chunk:
        """The stack of some modules, in the factors' own dtype, its coefficients beside it."""
        return stack_part(
            self._plans[bucket], lo, hi, self._flats, self._dtypes[bucket], self._clients
        )

    def stacked(self, bucket: int, lo: int, hi: int) -> Chunk:
        """The stack of some modules with the coefficients multiplied into A, in float32."""
        return stack_part(
            self._plans[bucket], lo, hi, self._flats, torch.float32, self._clients, scaled=True
        )

    def _scales(self, member: Member, totals: WeightTotals) -> Float64Array:
        divisors = [totals.total[slot.module] for slot in member.layout.slots]
        shares: Float64Array = member.slot_weights / np.array(divisors)
        return shares * self.index.placed(member.layout).scalings

    def _common_dtype(self, shape: tuple[int, int]) -> torch.dtype:
        distinct = {member.layout.digest: member.layout for member in self._members}
        found = [layout.dtypes_by_shape.get(shape) for layout in distinct.values()]
        return promoted(dtype for dtype in found if dtype is not None)
