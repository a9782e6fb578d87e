"""Who gets which module."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastagg.distributed.assignment import Assignment, module_cost

COSTS = st.lists(st.floats(1.0, 1e6), min_size=1, max_size=30)


@given(costs=COSTS, ranks=st.integers(1, 6))
def test_no_rank_has_much_more_than_its_share(costs: list[float], ranks: int) -> None:
    items = {("module", str(place)): cost for place, cost in enumerate(costs)}
    assignment = Assignment(ranks)
    assignment.assign(items)
    assert assignment.owner.keys() == items.keys()
    loads = [0.0] * ranks
    for item, rank in assignment.owner.items():
        loads[rank] += items[item]
    # Graham: whoever is last to be given an item had the least before it.
    assert max(loads) <= sum(costs) / ranks + max(costs) * (1 - 1 / ranks) + 1e-6 * sum(costs)
    if len(costs) <= ranks:
        assert max(loads) == max(costs)


def test_the_classic_worst_case() -> None:
    # Graham 1969: 4/3 - 1/(3 m) of the best, which is 9 for three machines.
    costs = {("module", name): cost for name, cost in zip("abcdefg", (5, 5, 4, 4, 3, 3, 3), strict=True)}
    assignment = Assignment(3)
    assignment.assign(costs)
    assert max(assignment.loads) == 11


@given(first=COSTS, later=COSTS, ranks=st.integers(1, 4))
def test_later_items_move_no_earlier_one(
    first: list[float], later: list[float], ranks: int
) -> None:
    assignment, again = Assignment(ranks), Assignment(ranks)
    known = {("module", str(place)): cost for place, cost in enumerate(first)}
    more = {("tensor", str(place)): cost for place, cost in enumerate(later)}
    assignment.assign(known)
    before = dict(assignment.owner)
    assignment.assign({**known, **more})
    assert before.items() <= assignment.owner.items()
    again.assign(dict(reversed(known.items())))
    again.assign(more)
    assert again.owner == assignment.owner


def test_a_module_costs_more_where_it_is_larger_or_has_more_clients() -> None:
    assert module_cost(64, 64, 8, 8) < module_cost(64, 128, 8, 8) < module_cost(64, 128, 32, 8)
