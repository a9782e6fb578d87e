"""Two accumulators of one round become one."""

from __future__ import annotations

from collections.abc import Sequence

from fastagg.accumulators.dense import DenseAccumulator
from fastagg.accumulators.means import MeanAccumulator
from fastagg.accumulators.stack import StackAccumulator
from fastagg.planning.roster import Member

__all__ = ["Accumulator", "join"]

Accumulator = StackAccumulator | DenseAccumulator | MeanAccumulator


def join(ours: Accumulator, theirs: Accumulator, members: Sequence[Member]) -> None:
    """Adds what another accumulator holds of these members, who are all of its own; it stays as it is.

    A stack that is to take sums in has to become dense before.
    """
    if isinstance(theirs, StackAccumulator) and isinstance(ours, StackAccumulator):
        ours.merge(theirs)
    elif isinstance(theirs, StackAccumulator):
        assert isinstance(ours, DenseAccumulator)
        ours.take(theirs, members)
    elif isinstance(theirs, DenseAccumulator):
        assert isinstance(ours, DenseAccumulator)
        ours.merge(theirs)
    else:
        assert isinstance(ours, MeanAccumulator)
        ours.merge(theirs)
