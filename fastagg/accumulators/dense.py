"""The dense accumulator: dW itself, a running sum; its memory does not grow with the clients.

Each entry of dW is a float32 sum in the order of arrival. With unit roundoff u = 2^-24 it differs
from the exact value by at most ``(K + r + 4) u sum_k p_k |s_k| (|B_k| |A_k|)`` for K clients of
rank r or less, so two orders of arrival agree to twice that, not to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fastagg import ops
from fastagg.accumulators.blocks import Blocks
from fastagg.accumulators.held import Held
from fastagg.accumulators.source import Chunk
from fastagg.accumulators.stack import StackAccumulator
from fastagg.accumulators.staging import Staging
from fastagg.accumulators.weights import WeightUnit, check_totals
from fastagg.accumulators.whole import SummedWhole, WholeSums
from fastagg.devices import uploaded
from fastagg.errors import InvalidInput
from fastagg.peft_format.layout import Layout
from fastagg.planning.budget import CHUNK_BYTES
from fastagg.planning.plan import Bucket, WeightTotals
from fastagg.planning.roster import Member, Roster

__all__ = ["DenseAccumulator", "DenseSource"]


class DenseAccumulator:
    """sum_k w_k s_kj B_kj A_kj for each module j, (m, n) in float32, and the sums of the weights.

    Attributes:
        discarded: module -> upper bound, in the sums' unit, of what condensing clients cost its sum.
        divided: ``finish`` has begun to divide the sums.
    """

    kind = "dense"

    def __init__(
        self, device: torch.device, missing: str, fold_limit: int = CHUNK_BYTES
    ) -> None:
        self.device = device
        self.staging = Staging(device)
        self.blocks: Blocks[torch.Tensor] = Blocks(self._zeros, fold_limit)
        self.totals = WeightTotals(missing)
        self.unit = WeightUnit()
        self.whole = WholeSums(device)
        self.discarded: dict[str, float] = {}
        self.divided = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(sums.nbytes for sums in self.blocks.sums) + self.whole.nbytes

    def add(self, members: Sequence[Member], flats: Sequence[torch.Tensor]) -> None:
        """Adds the updates of some clients, stacked into one product per module.

        Buffers that are elsewhere come to the device one after the other, each to be added alone.
        """
        held = [Held.of(member, flat) for member, flat in zip(members, flats, strict=True)]
        if all(flat.device == self.device for flat in flats):
            self._fold(held)
        else:
            for each in held:
                self._fold([replace(each, flat=self.staging.bring(each.flat))])
        for member in members:
            self.totals.add(member)

    def take(self, stack: StackAccumulator, members: Sequence[Member]) -> None:
        """Adds the clients of a stack, who are the members; it stays as it is."""
        own = [member for member in members if member.client in stack.flats]
        if own:
            self.add(own, [stack.flats[member.client] for member in own])
        for group in stack.condensed:
            self._fold([replace(group, flat=self.staging.bring(group.flat))])
            for slot, weight, error in zip(
                group.layout.slots, self.unit.of_all(group.slot_weights), group.errors, strict=True
            ):
                cost = self.discarded.get(slot.module, 0.0) + float(weight * error)
                self.discarded[slot.module] = cost
        for member in members:
            if member.client not in stack.flats:
                self.totals.add(member)

    def _fold(self, held: Sequence[Held]) -> None:
        for each in held:
            self.blocks.make_room(shapes_of(each.layout))
            self._rescale(self.unit.admit(float(each.slot_weights.max(initial=0.0))))
        scales = [
            self.unit.of_all(each.slot_weights) * self.blocks.index.placed(each.layout).scalings
            for each in held
        ]
        for block, lo, hi, chunk in self.blocks.stacks(held, [each.flat for each in held], scales):
            a, bt = chunk.factors
            ops.reconstruct_(self.blocks.sums[block][lo:hi], a, bt, chunk.coefficients)
        for each in held:
            self.whole.add(each)

    def merge(self, other: DenseAccumulator) -> None:
        """Adds the sums of other clients; ``other`` stays as it is."""
        own, ratio = self.unit.join(other.unit)
        self._rescale(own)
        for bucket, sums in zip(other.blocks.buckets, other.blocks.sums, strict=True):
            self.blocks.make_room(dict.fromkeys(bucket.modules, (bucket.m, bucket.n)))
            for place, module in enumerate(bucket.modules):
                block, mine = self.blocks.index.where(module)
                self.blocks.sums[block][mine].add_(sums[place].to(self.device), alpha=ratio)
        for module, cost in other.discarded.items():
            self.discarded[module] = self.discarded.get(module, 0.0) + ratio * cost
        self.totals = self.totals.merged(other.totals)
        self.whole.merge(other.whole)

    def finish(self, roster: Roster, missing: str) -> DenseSource:
        """The aggregate: divides the sums in place, so the accumulator is done with.

        Raises:
            InvalidInput: weights that leave a module without an average; nothing is changed then.
        """
        check_totals(self.totals)
        self.blocks.check_finite()
        whole = self.whole.finish()
        self.divided = True
        shares = self._shares(self.totals)
        for sums, share in zip(self.blocks.sums, shares, strict=True):
            sums.mul_(share)
        return DenseSource(self.blocks, whole, self.device, self._discarded(self.totals))

    def averages(self, totals: WeightTotals) -> DenseAverages:
        """The aggregate divided by these sums of the weights; the accumulator stays as it is."""
        whole = SummedWhole(self.whole)
        discarded = self._discarded(totals)
        return DenseAverages(self.blocks, whole, self.device, discarded, self._shares(totals))

    def _shares(self, totals: WeightTotals) -> list[torch.Tensor]:
        """What each block's sums are multiplied by, (L, 1, 1)."""
        shares = []
        for bucket, sums in zip(self.blocks.buckets, self.blocks.sums, strict=True):
            values = [1.0 / self.unit.of(totals.total[module]) for module in bucket.modules]
            on_device = uploaded(torch.tensor(values, dtype=sums.dtype), sums.device)
            shares.append(on_device[:, None, None])
        return shares

    def _discarded(self, totals: WeightTotals) -> dict[str, float]:
        return {
            module: cost / self.unit.of(totals.total[module])
            for module, cost in self.discarded.items()
        }

    def _zeros(self, bucket: Bucket) -> torch.Tensor:
        shape = (len(bucket.modules), bucket.m, bucket.n)
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _rescale(self, factor: float) -> None:
        if factor != 1.0:
            for sums in self.blocks.sums:
                sums.mul_(factor)
            self.discarded = {module: factor * cost for module, cost in self.discarded.items()}


class DenseSource:
    """dW of every module."""

    kind = "dense"

    def __init__(
        self,
        blocks: Blocks[torch.Tensor],
        whole: SummedWhole,
        device: torch.device,
        discarded: Mapping[str, float],
    ) -> None:
        self.index = blocks.index
        self.whole = whole
        self.device = device
        self.discarded = discarded
        self._sums = blocks.sums

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(sums.nbytes for sums in self._sums) + self.whole.nbytes

    def rows(self, bucket: int) -> list[int]:
        """0 for each module: there are no slabs."""
        return [0] * len(self.index.buckets[bucket].modules)

    def itemsize(self, bucket: int) -> int:
        """Bytes of a number of a bucket's slabs."""
        return 4

    def load(self, bucket: int, lo: int, hi: int) -> Chunk:
        """dW of some modules, as a view."""
        shape = self.index.buckets[bucket]
        return Chunk(
            shape.modules[lo:hi],
            shape.m,
            shape.n,
            torch.zeros(hi - lo, dtype=torch.int64).numpy(),
            dense=self._sums[bucket][lo:hi],
        )

    def stacked(self, bucket: int, lo: int, hi: int) -> Chunk:
        """Refuses: the factors were multiplied out."""
        raise InvalidInput(
            "the dense accumulator holds dW, not the clients' factors, so there is no stack",
            field="accumulator",
            expected="'stack'",
            got="'dense'",
            cure="Aggregate with accumulator='stack' and a max_memory that holds all adapters",
        )


class DenseAverages(DenseSource):
    """dW of every module, divided as it is read: a copy of some modules at a time."""

    def __init__(
        self,
        blocks: Blocks[torch.Tensor],
        whole: SummedWhole,
        device: torch.device,
        discarded: Mapping[str, float],
        shares: Sequence[torch.Tensor],
    ) -> None:
        super().__init__(blocks, whole, device, discarded)
        self._shares = shares

    def load(self, bucket: int, lo: int, hi: int) -> Chunk:
        """dW of some modules."""
        chunk = super().load(bucket, lo, hi)
        assert chunk.dense is not None
        return replace(chunk, dense=chunk.dense * self._shares[bucket][lo:hi])


def shapes_of(layout: Layout) -> dict[str, tuple[int, int]]:
    """Module -> (m, n)."""
    return {slot.module: (slot.m, slot.n) for slot in layout.slots}
