"""The stack accumulator: every client's factors as they came; exact, and it grows with the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fastagg.accumulators.condensed import Condensed
from fastagg.accumulators.held import Held
from fastagg.accumulators.source import Chunk, stack_part
from fastagg.accumulators.staging import Staging
from fastagg.accumulators.weights import check_totals
from fastagg.accumulators.whole import HeldWhole
from fastagg.errors import InvalidInput
from fastagg.peft_format.layout import Layout, promoted
from fastagg.planning.plan import ModuleIndex, WeightTotals, padded
from fastagg.planning.roster import Float64Array, Member, Roster

__all__ = ["StackAccumulator", "StackSource"]


class StackAccumulator:
    """A copy of each client's flat buffer; nothing is computed before the end.

    Sums are taken at the end, over the clients sorted by id: the result has the same bits whatever
    the order of arrival. Memory: the bytes of the adapters.

    Attributes:
        flats: client -> its buffer; of those that were not condensed.
        condensed: what is held in the place of the other clients.
    """

    kind = "stack"

    def __init__(self, device: torch.device, condensed: Sequence[Condensed] = ()) -> None:
        self.device = device
        self.staging = Staging(device)
        self.flats: dict[str, torch.Tensor] = {}
        self.condensed = list(condensed)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        condensed = sum(group.flat.numel() for group in self.condensed)
        return condensed + sum(flat.numel() for flat in self.flats.values())

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
        flats = {name: self.staging.bring(flat) for name, flat in other.flats.items()}
        groups = [replace(each, flat=self.staging.bring(each.flat)) for each in other.condensed]
        self.flats.update(flats)
        self.condensed.extend(groups)

    def discard(self, members: Sequence[Member]) -> None:
        """Lets the buffers of clients go that were not admitted after all."""
        gone = {member.client for member in members}
        for client in gone:
            self.flats.pop(client, None)
        self.condensed = [group for group in self.condensed if gone.isdisjoint(group.clients)]

    def layouts(self, members: Sequence[Member]) -> list[Layout]:
        """The layouts of what is held of these members, who are all of the stack's."""
        own = [member.layout for member in members if member.client in self.flats]
        return own + [group.layout for group in self.condensed]

    def held(self, members: Sequence[Member]) -> list[Held]:
        """What is held of these members, sorted by id, who are all of the stack's.

        What stands for several clients follows the clients, by the least of their ids.
        """
        own = [
            Held.of(member, self.flats[member.client])
            for member in members
            if member.client in self.flats
        ]
        return own + sorted(self.condensed, key=lambda group: group.clients)

    def averages(self, members: Sequence[Member], totals: WeightTotals) -> StackSource:
        """The aggregate of the members, sorted by id, divided by these sums of their weights."""
        held = self.held(members)
        discarded: dict[str, float] = {}
        for group in self.condensed:
            for slot, weight, error in zip(
                group.layout.slots, group.slot_weights, group.errors, strict=True
            ):
                share = float(weight) / totals.total[slot.module]
                discarded[slot.module] = discarded.get(slot.module, 0.0) + share * float(error)
        shares = [_shares(each, totals) for each in held]
        index = ModuleIndex.of(
            {
                slot.module: (slot.m, slot.n)
                for layout in {each.layout for each in held}
                for slot in layout.slots
            }
        )
        return StackSource(held, shares, index, self.device, discarded)

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
        source = self.averages(members, totals)
        source.whole.check()
        return source

    def _copied(self, flat: torch.Tensor) -> torch.Tensor:
        brought = self.staging.bring(flat)
        return brought.clone() if brought is flat else brought


class StackSource:
    """The stack of all that is held, built from the buffers some modules at a time.

    Args:
        held: the adapters.
        shares: (J,) of each, what its update of each slot is multiplied by beside the scaling.
        index: the modules.
        discarded: see :class:`fastagg.accumulators.Source`.
    """

    kind = "stack"

    def __init__(
        self,
        held: Sequence[Held],
        shares: Sequence[Float64Array],
        index: ModuleIndex,
        device: torch.device,
        discarded: Mapping[str, float],
    ) -> None:
        self.device = device
        self.index = index
        self.discarded = discarded
        self._clients = [each.client for each in held]
        self._flats = [each.flat for each in held]
        self._condensed = any(isinstance(each, Condensed) for each in held)
        layouts = [each.layout for each in held]
        scalings = [index.placed(layout).scalings for layout in layouts]
        scales = [share * own for share, own in zip(shares, scalings, strict=True)]
        self._plans = index.plan(layouts, scales)
        distinct = {layout.digest: layout for layout in layouts}.values()
        self._dtypes = [_common_dtype(distinct, (bucket.m, bucket.n)) for bucket in index.buckets]
        self.whole = HeldWhole(held, device)

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
        """The stack of some modules with the coefficients multiplied into A, in float32.

        Raises:
            InvalidInput: the factors of some clients were condensed.
        """
        if self._condensed:
            raise InvalidInput(
                "the factors of some clients were condensed, so there is no stack of all",
                field="condense",
                expected="every client's own factors",
                cure="Merge the states of aggregators that were not condensed",
            )
        return stack_part(
            self._plans[bucket], lo, hi, self._flats, torch.float32, self._clients, scaled=True
        )


def _shares(held: Held, totals: WeightTotals) -> Float64Array:
    divisors = [totals.total[slot.module] for slot in held.layout.slots]
    shares: Float64Array = held.slot_weights / np.array(divisors)
    return shares


def _common_dtype(layouts: Iterable[Layout], shape: tuple[int, int]) -> torch.dtype:
    found = [layout.dtypes_by_shape.get(shape) for layout in layouts]
    return promoted(dtype for dtype in found if dtype is not None)
