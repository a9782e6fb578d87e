"""The dense accumulator: dW itself, a running sum; its memory does not grow with the clients.

Each entry of dW is a float32 sum in the order of arrival. With unit roundoff u = 2^-24 it differs
from the exact value by at most ``(K + r + 4) u sum_k p_k |s_k| (|B_k| |A_k|)`` for K clients of
rank r or less, so two orders of arrival agree to twice that, not to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastagg import ops
from fastagg.accumulators.blocks import Blocks
from fastagg.accumulators.source import Chunk
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
        self.divided = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(sums.nbytes for sums in self.blocks.sums) + self.whole.nbytes

    def add(self, members: Sequence[Member], flats: Sequence[torch.Tensor]) -> None:
        """Adds the updates of some clients, stacked into one product per module.

        Buffers that are elsewhere come to the device one after the other, each to be added alone.
        """
        if all(flat.device == self.device for flat in flats):
            self._fold(members, flats)
            return
        for member, flat in zip(members, flats, strict=True):
            self._fold([member], [self.staging.bring(flat)])

    def _fold(self, members: Sequence[Member], flats: Sequence[torch.Tensor]) -> None:
        for member in members:
            self.blocks.make_room(shapes_of(member.layout))
            self._rescale(self.unit.admit(float(member.slot_weights.max(initial=0.0))))
        scales = [
            self.unit.of_all(member.slot_weights)
            * self.blocks.index.placed(member.layout).scalings
            for member in members
        ]
        for block, lo, hi, chunk in self.blocks.stacks(members, flats, scales):
            a, bt = chunk.factors
            ops.reconstruct_(self.blocks.sums[block][lo:hi], a, bt, chunk.coefficients)
        for member, flat in zip(members, flats, strict=True):
            self.totals.add(member)
            self.whole.add(member, flat)

    def merge(self, other: DenseAccumulator) -> None:
        """Adds the sums of other clients; ``other`` stays as it is."""
        own, ratio = self.unit.join(other.unit)
        self._rescale(own)
        for bucket, sums in zip(other.blocks.buckets, other.blocks.sums, strict=True):
            self.blocks.make_room(dict.fromkeys(bucket.modules, (bucket.m, bucket.n)))
            for place, module in enumerate(bucket.modules):
                block, mine = self.blocks.index.where(module)
                self.blocks.sums[block][mine].add_(sums[place].to(self.device), alpha=ratio)
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
        for bucket, sums in zip(self.blocks.buckets, self.blocks.sums, strict=True):
            shares = [1.0 / self.unit.of(self.totals.total[module]) for module in bucket.modules]
            sums.mul_(uploaded(torch.tensor(shares, dtype=sums.dtype), sums.device)[:, None, None])
        return DenseSource(self.blocks, whole, self.device)

    def _zeros(self, bucket: Bucket) -> torch.Tensor:
        shape = (len(bucket.modules), bucket.m, bucket.n)
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _rescale(self, factor: float) -> None:
        if factor != 1.0:
            for sums in self.blocks.sums:
                sums.mul_(factor)


class DenseSource:
    """dW of every module."""

    kind = "dense"

    def __init__(
        self, blocks: Blocks[torch.Tensor], whole: SummedWhole, device: torch.device
    ) -> None:
        self.index = blocks.index
        self.whole = whole
        self.device = device
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


def shapes_of(layout: Layout) -> dict[str, tuple[int, int]]:
    """Module -> (m, n)."""
    return {slot.module: (slot.m, slot.n) for slot in layout.slots}
