"""What is left of clients whose adapters were given up for a truncation of their weighted sum.

For the members k of a group G and a module j,

    W_j B_j A_j  ~  sum_{k in G} w_kj s_kj B_kj A_kj,   W_j = sum_{k in G} w_kj

with B_j A_j the best rank-r approximation of the members' average: the group is held as one adapter of
scaling 1 that counts W_j. What the sum is divided by in the end is not needed for that, so groups, and
groups of groups, are added up as clients are.

The truncation's error is measured: e_j = |average - B_j A_j|_F. Errors add up by the triangle
inequality: with the groups' errors e_Gj and the round's divisor D_j, dW_j is off by at most
sum_G (W_Gj / D_j) e_Gj; a group of groups begins with that sum over its parts, D_j being its own W_j.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fastagg.accumulators.held import Held
from fastagg.accumulators.whole import sum_dtype
from fastagg.peft_format.layout import Layout, Slot
from fastagg.planning.roster import Float64Array, Roster

__all__ = ["Condensed", "condensed_layout", "name_of"]


@dataclass(frozen=True, eq=False)
class Condensed(Held):
    """One adapter in the place of those of some clients; it never changes.

    Attributes:
        clients: the ids of the clients it stands for, sorted.
        errors: (J,) upper bounds of |average - B A|_F, in the order of the slots.
    """

    clients: tuple[str, ...]
    errors: Float64Array


def name_of(clients: Sequence[str]) -> str:
    """What messages call these clients together."""
    return f"{clients[0]} and {len(clients) - 1} more, condensed"


def condensed_layout(roster: Roster, ranks: Mapping[str, int], whole: Iterable[str]) -> Layout:
    """The layout of a :class:`Condensed`: float32 factors of scaling 1, and averages.

    Args:
        ranks: module -> rank, of the modules that its clients have.
        whole: the keys of their whole tensors, which are kept as running sums are.
    """
    slots = [_in_float32(roster.slots[module][0]) for module in ranks]
    spans = [roster.whole[key][0] for key in whole]
    averages = [replace(span, dtype=sum_dtype(span.count)) for span in spans]
    return Layout.fresh(slots, ranks, dict.fromkeys(ranks, 1.0), whole=averages)


def _in_float32(slot: Slot) -> Slot:
    a, b = (replace(span, dtype=torch.float32) for span in (slot.a, slot.b))
    return replace(slot, a=a, b=b)
