"""Which accumulator a round needs, and whether it fits into the memory that it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from fastagg.accumulators import Accumulator, DenseAccumulator, MeanAccumulator, StackAccumulator
from fastagg.accumulators.staging import Staging
from fastagg.accumulators.whole import WholeSums
from fastagg.distributed.share import Share
from fastagg.handouts.choices import Settings
from fastagg.handouts.writer import module_bytes
from fastagg.method import Method
from fastagg.peft_format.layout import Layout
from fastagg.planning.budget import CHUNK_BYTES, require
from fastagg.planning.plan import padded
from fastagg.planning.roster import Roster

__all__ = ["Accumulator", "MemoryPlan"]

# A stack below this is kept though dW were smaller: it is exact to the last bit of its factors, does
# not depend on the order of arrival, and can be handed out itself.
WORTH_CHANGING = 64 << 20

_CURE = "Raise max_memory, or aggregate fewer clients or modules at a time"


@dataclass(frozen=True)
class _Needs:
    """Bytes that a round of some clients takes; work is that on one module at a time.

    Attributes:
        stack, dense, means: the accumulators.
        stack_work, dense_work, means_work: what is needed beside them.
    """

    stack: int
    dense: int
    means: int
    stack_work: int
    dense_work: int
    means_work: int


@dataclass(frozen=True)
class MemoryPlan:
    """The rules by which memory is spent: that of the device that adds up.

    Whether dW is worth changing to is a question of the whole round, so that several processes choose
    as one would; whether it fits, of the process that needs most.

    Attributes:
        budget: bytes that accumulator and workspace may take together; None: any.
        mode: "auto", "stack" or "dense", as the user chose.
        settled: the accumulator of a round whose clients are all known, and whose needs in the end
            were found to fit; None where they are not known.
    """

    method: Method
    settings: Settings
    budget: int | None
    mode: str
    settled: str | None = None

    @property
    def fold_limit(self) -> int:
        """Bytes of slabs that folding a client into sums may take at a time."""
        return CHUNK_BYTES if self.budget is None else min(CHUNK_BYTES, self.budget // 16)

    @property
    def may_change(self) -> bool:
        """Whether a stack may be turned into dW because of its size."""
        return self.settled is None and self.mode == "auto" and self.allows("dense")

    @property
    def first(self) -> str:
        """The accumulator that a round begins with."""
        if self.settled is not None:
            return self.settled
        return next(kind for kind in ("means", "stack", "dense") if self.allows(kind))

    def allows(self, kind: str) -> bool:
        """Whether the method and the user's choice leave this accumulator."""
        return kind in self.method.accumulators and self.mode in ("auto", kind)

    def _outgrown(self, needs: _Needs) -> bool:
        """Whether dW is so much smaller than the stack that it is worth the stack's virtues."""
        return needs.stack > max(needs.dense, WORTH_CHANGING)

    def turns_dense(
        self,
        share: Share,
        accumulator: Accumulator,
        layouts: Sequence[Layout],
        joined: Accumulator | None = None,
    ) -> bool:
        """Whether the stack must become dense before clients of these layouts are added.

        Under "auto" that is when the stack would outgrow dW (and is worth the change), or at the
        last moment at which the budget holds both, as the change needs.

        Args:
            joined: the accumulator that holds the clients, when two are merged.

        Raises:
            MemoryBudgetExceeded: nothing fits; ``needed`` is the least that would.
        """
        joins_sums = isinstance(joined, DenseAccumulator) and not isinstance(
            accumulator, DenseAccumulator
        )
        if self.budget is None and not self._may_outgrow(share.whole, accumulator, layouts):
            return joins_sums
        outgrown = self._outgrown(self._needs(share.whole, layouts))
        if self.budget is None and not joins_sums:
            return outgrown
        needs = self._needs_of_one(share, layouts)
        (held,) = share.most([accumulator.nbytes])
        if joins_sums:
            changing = held + needs.dense + needs.dense_work
            self._require(changing, "turning the stack into dW")
            return True
        if self.settled == accumulator.kind:
            # The work beside a part of the clients may exceed that in the end: routes change.
            needs = replace(needs, stack_work=0, dense_work=0, means_work=0)
        if isinstance(accumulator, MeanAccumulator):
            own = [share.part_of(layout) for layout in layouts]
            growing = accumulator.growing_bytes(share.own.widths_with(own))
            work = max(needs.means_work, *share.most([growing]))
            self._require(needs.means + work, "the sum of the factors")
            return False
        if isinstance(accumulator, DenseAccumulator):
            self._require(needs.dense + needs.dense_work, "the dense accumulator")
            return False
        staying = needs.stack + needs.stack_work
        if not self.may_change:
            self._require(staying, "the stack of all adapters")
            return False
        changing = held + needs.dense + needs.dense_work
        assert self.budget is not None
        if staying > self.budget or outgrown:
            if changing > self.budget:
                self._require(min(staying, changing), "adding this client")
            return changing <= self.budget
        later = needs.stack + needs.dense + needs.dense_work
        return changing <= self.budget < later

    def choose(self, share: Share) -> tuple[str, int]:
        """The accumulator for a round whose clients are all known, and the bytes that it takes.

        The stack, unless dW is smaller and worth it, or alone fits.

        Raises:
            MemoryBudgetExceeded: none fits; ``needed`` is the least that would.
        """
        needs = self._needs_of_one(share, ())
        if "means" in self.method.accumulators:
            total = {"means": needs.means + needs.means_work}
        else:
            total = {
                "stack": needs.stack + needs.stack_work,
                "dense": needs.dense + needs.dense_work,
            }
        kinds = [kind for kind in total if self.allows(kind)]
        if len(kinds) > 1 and self._outgrown(self._needs(share.whole, ())):
            kinds.reverse()
        fitting = [kind for kind in kinds if self.budget is None or total[kind] <= self.budget]
        best = fitting[0] if fitting else min(kinds, key=lambda kind: total[kind])
        what = "the sum of the factors" if best == "means" else f"the {best} accumulator"
        self._require(total[best], f"{what} of {len(share.whole)} clients")
        return best, total[best]

    def check_held(self, nbytes: int) -> None:
        """Whether an accumulator that was saved may be held at all.

        Raises:
            MemoryBudgetExceeded: it may not.
        """
        self._require(nbytes, "the saved round")

    def _may_outgrow(
        self, roster: Roster, accumulator: Accumulator, layouts: Sequence[Layout]
    ) -> bool:
        """Whether the needs must be looked at although there is no budget."""
        if not (self.may_change and isinstance(accumulator, StackAccumulator)):
            return False
        return roster.nbytes + sum(layout.nbytes for layout in layouts) > WORTH_CHANGING

    def _require(self, needed: int, what: str) -> None:
        require(needed, self.budget, what, _CURE)

    def _needs_of_one(self, share: Share, layouts: Sequence[Layout]) -> _Needs:
        """Of the process that needs most: a budget is each process's."""
        needs = self._needs(share.own, [share.part_of(layout) for layout in layouts])
        return _Needs(*share.most(astuple(needs)))

    def _needs(self, roster: Roster, layouts: Sequence[Layout]) -> _Needs:
        whole = WholeSums.bytes_for(roster.whole_with(layouts))
        largest = max([roster.largest, *(layout.nbytes for layout in layouts)])
        staged = Staging.bytes_for(self.settings.device, largest)
        dense = means = stack_work = dense_work = means_work = 0
        for (m, n), size in roster.shapes_with(layouts).items():
            count, rank_sum, width = size.count, size.rank_sum, size.width
            handed = width if self.method.handout.ranked else rank_sum
            dense += count * m * n * 4
            means += count * width * (m + n) * 8
            work = [
                module_bytes(self.method.handout, self.settings, m, n, rows, handed)
                for rows in (padded(rank_sum), 0, padded(width))
            ]
            slabs = count * padded(width) * (m + n) * 4
            folding = max(padded(width) * (m + n) * 4, min(self.fold_limit, slabs))
            stack_work = max(stack_work, work[0])
            dense_work = max(dense_work, work[1], folding + staged)
            # Folding casts each slab to the float64 of the sums.
            means_work = max(means_work, work[2], 2 * folding + staged)
        stack = roster.nbytes + sum(layout.nbytes for layout in layouts)
        return _Needs(stack, dense + whole, means + whole, stack_work, dense_work, means_work)
