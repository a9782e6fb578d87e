"""Which rank has which modules and whole tensors."""

from __future__ import annotations

from collections.abc import Mapping

from fastagg import linalg

__all__ = ["Assignment", "Item", "module_cost", "tensor_cost"]

# ("module", its name) or ("tensor", its key).
Item = tuple[str, str]

# What reading one byte, checking and copying it costs in the cost model's multiply-adds.
_BYTE = 8.0


class Assignment:
    """Items shared out by cost: the dearest first, each to the rank with the least to do so far.

    Items known together are within 4/3 of the best that can be (longest processing time first,
    Graham 1969); those that turn up later never move. The same calls give the same ranks everywhere.

    Attributes:
        owner: item -> rank.
        loads: by rank.
    """

    def __init__(self, ranks: int) -> None:
        self.owner: dict[Item, int] = {}
        self.loads = [0.0] * ranks

    def copy(self) -> Assignment:
        """One that goes its own way from here."""
        copied = Assignment(len(self.loads))
        copied.owner, copied.loads = dict(self.owner), list(self.loads)
        return copied

    def assign(self, costs: Mapping[Item, float]) -> None:
        """Shares out the items that are new."""
        new = [item for item in costs if item not in self.owner]
        for item in sorted(new, key=lambda item: (-costs[item], item)):
            rank = min(range(len(self.loads)), key=self.loads.__getitem__)
            self.owner[item] = rank
            self.loads[rank] += costs[item]


def module_cost(m: int, n: int, rank_sum: int, width: int) -> float:
    """What a module takes: its clients' factors read once, and one decomposition.

    In fp32 multiply-adds, as :func:`fastagg.linalg.route_costs` counts.
    """
    routes = linalg.route_costs(m, n, rank_sum, 2 * width)
    return _BYTE * 4 * rank_sum * (m + n) + min(routes.values())


def tensor_cost(nbytes: int, clients: int) -> float:
    """What the average of a whole tensor takes."""
    return _BYTE * nbytes * clients
