"""The means accumulator: running sums of the zero-padded factors themselves.

Sums are float64: the numbers are few (the factors of the largest rank, once), a float32 sum would
be the largest error of the whole method, and weights of any scale fit without care. A sum of
float32 values in float64 is off by K 2^-53, so the factors that are handed out hardly ever depend
on the order of arrival; equal bits are promised only for equal order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastagg.accumulators.blocks import Blocks
from fastagg.accumulators.dense import shapes_of
from fastagg.accumulators.held import Held
from fastagg.accumulators.source import Chunk
from fastagg.accumulators.staging import Staging
from fastagg.accumulators.weights import check_totals
from fastagg.accumulators.whole import SummedWhole, WholeSums
from fastagg.devices import uploaded
from fastagg.errors import InvalidInput
from fastagg.planning.budget import CHUNK_BYTES
from fastagg.planning.plan import Bucket, WeightTotals, padded
from fastagg.planning.roster import Member, ModuleSize, Roster

__all__ = ["FactorSums", "MeanAccumulator", "MeanSource"]


@dataclass
class FactorSums:
    """sum_k w_kj A_kj (L, r, n) and sum_k w_kj s_kj B_kj^T (L, r, m) of one block, float64.

    r is the largest rank so far; ``ranks`` (L,) is each module's own.
    """

    a: torch.Tensor
    bt: torch.Tensor
    ranks: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes of both sums."""
        return self.a.nbytes + self.bt.nbytes

    def grow(self, rank: int) -> None:
        """Pads the sums with zeros to ``rank`` rows."""
        more = rank - self.a.shape[1]
        if more > 0:
            self.a = torch.nn.functional.pad(self.a, (0, 0, 0, more))
            self.bt = torch.nn.functional.pad(self.bt, (0, 0, 0, more))


class MeanAccumulator:
    """Weighted sums of A and of s B for each module, padded with zero rows to the largest rank.

    The scaling goes into B, so that clients of unlike scalings may be averaged; with one scaling
    for all this is the plain average of the factors, times that scaling.
    """

    kind = "means"

    def __init__(
        self, device: torch.device, missing: str, fold_limit: int = CHUNK_BYTES
    ) -> None:
        self.device = device
        self.staging = Staging(device)
        self.blocks: Blocks[FactorSums] = Blocks(self._zeros, fold_limit)
        self.totals = WeightTotals(missing)
        self.whole = WholeSums(device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(sums.nbytes for sums in self.blocks.sums) + self.whole.nbytes

    def reserve(self, sizes: Mapping[str, ModuleSize]) -> None:
        """Makes room for modules whose largest ranks are known, which saves growing later."""
        self.blocks.make_room({module: (size.m, size.n) for module, size in sizes.items()})
        for bucket, sums in zip(self.blocks.buckets, self.blocks.sums, strict=True):
            sums.grow(max(sizes[module].width for module in bucket.modules))

    def growing_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes that growing to these ranks takes for a moment beside the sums themselves."""
        return max(
            (
                max(sums.a.nbytes, sums.bt.nbytes)
                for bucket, sums in zip(self.blocks.buckets, self.blocks.sums, strict=True)
                if any(ranks.get(module, 0) > sums.a.shape[1] for module in bucket.modules)
            ),
            default=0,
        )

    def add(self, members: Sequence[Member], flats: Sequence[torch.Tensor]) -> None:
        """Adds the factors of some clients, one client after the other."""
        for member, flat in zip(members, flats, strict=True):
            self._add(member, self.staging.bring(flat))

    def merge(self, other: MeanAccumulator) -> None:
        """Adds the sums of other clients; ``other`` stays as it is."""
        for bucket, sums in zip(other.blocks.buckets, other.blocks.sums, strict=True):
            self.blocks.make_room(dict.fromkeys(bucket.modules, (bucket.m, bucket.n)))
            for place, module in enumerate(bucket.modules):
                block, mine = self.blocks.index.where(module)
                target, rank = self.blocks.sums[block], sums.ranks[place]
                target.grow(rank)
                target.ranks[mine] = max(target.ranks[mine], rank)
                target.a[mine, :rank].add_(sums.a[place, :rank].to(self.device))
                target.bt[mine, :rank].add_(sums.bt[place, :rank].to(self.device))
        self.totals = self.totals.merged(other.totals)
        self.whole.merge(other.whole)

    def finish(self, roster: Roster, missing: str) -> MeanSource:
        """The means.

        Raises:
            InvalidInput: weights that leave a module without an average.
        """
        check_totals(self.totals)
        self.blocks.check_finite()
        return MeanSource(self.blocks, self.totals, self.whole.finish(), self.device)

    def _add(self, member: Member, flat: torch.Tensor) -> None:
        self.blocks.make_room(shapes_of(member.layout))
        placed = self.blocks.index.placed(member.layout)
        weights = dict(zip(placed.modules.tolist(), member.slot_weights.tolist(), strict=True))
        weighted = member.slot_weights * placed.scalings
        stacks = self.blocks.stacks([member], [flat], [weighted], torch.float32)
        for block, lo, hi, chunk in stacks:
            sums = self.blocks.sums[block]
            rank = int(chunk.ranks.max())
            sums.grow(rank)
            sums.ranks[lo:hi] = np.maximum(sums.ranks[lo:hi], chunk.ranks).tolist()
            of_a = [weights[self.blocks.index.number[name]] for name in chunk.modules]
            assert chunk.coefficients is not None
            of_b = chunk.coefficients[:, :1, None]
            a, bt = chunk.factors
            sums.a[lo:hi, :rank].add_(a[:, :rank].double().mul_(self._column(of_a)))
            sums.bt[lo:hi, :rank].add_(bt[:, :rank].double().mul_(of_b))
        self.totals.add(member)
        self.whole.add(Held.of(member, flat))

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return uploaded(torch.tensor(values, dtype=torch.float64), self.device)[:, None, None]

    def _zeros(self, bucket: Bucket) -> FactorSums:
        count = len(bucket.modules)
        a = torch.zeros(count, 0, bucket.n, dtype=torch.float64, device=self.device)
        bt = torch.zeros(count, 0, bucket.m, dtype=torch.float64, device=self.device)
        return FactorSums(a, bt, [0] * count)


class MeanSource:
    """The mean factors, as a stack of one client whose scaling is 1."""

    kind = "means"

    def __init__(
        self,
        blocks: Blocks[FactorSums],
        totals: WeightTotals,
        whole: SummedWhole,
        device: torch.device,
    ) -> None:
        self.index = blocks.index
        self.whole = whole
        self.device = device
        self.discarded: Mapping[str, float] = {}
        self._sums = blocks.sums
        self._totals = totals

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(sums.nbytes for sums in self._sums) + self.whole.nbytes

    def rows(self, bucket: int) -> list[int]:
        """Rows of each module's slabs."""
        return [self._rows(bucket)] * len(self.index.buckets[bucket].modules)

    def itemsize(self, bucket: int) -> int:
        """Bytes of a number of a bucket's slabs."""
        return 4

    def load(self, bucket: int, lo: int, hi: int) -> Chunk:
        """The mean factors of some modules in float32."""
        shape, sums, rows = self.index.buckets[bucket], self._sums[bucket], self._rows(bucket)
        modules = shape.modules[lo:hi]
        rank = sums.a.shape[1]
        a, bt = (
            torch.zeros(hi - lo, rows, length, dtype=torch.float32, device=sums.a.device)
            for length in (shape.n, shape.m)
        )
        for place, module in enumerate(modules):  # the quotients of one module at a time in float64
            a[place, :rank] = sums.a[lo + place] / self._totals.total[module]
            bt[place, :rank] = sums.bt[lo + place] / self._totals.total[module]
        return Chunk(modules, shape.m, shape.n, np.array(sums.ranks[lo:hi]), a, bt)

    def stacked(self, bucket: int, lo: int, hi: int) -> Chunk:
        """Refuses: only the sums were kept."""
        raise InvalidInput(
            "a method that averages the factors keeps their sums, so there is no stack",
            field="method",
            expected="flora or flexlora",
            cure="Take .adapter(rank=..), or aggregate with method flora",
        )

    def _rows(self, bucket: int) -> int:
        return padded(self._sums[bucket].a.shape[1])
