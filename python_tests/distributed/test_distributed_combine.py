"""Clients that came to different processes: joined as if one had seen them all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from equations import (
    Client,
    all_modules,
    as_matrix,
    client,
    exact,
    mixed_round,
    one_thread,  # noqa: F401
    shares,
)
from ranks import Ranks
from sharded_jobs import KINDS, answers, differing, rank_of, refusal, round_for, streamed
from test_distributed_rounds import check_delta, stranger

from fastagg import Aggregator


def of_rank(clients: list[Client], group: dist.ProcessGroup) -> list[Client]:
    size = dist.get_world_size(group)
    return [each for place, each in enumerate(clients) if place % size == rank_of(group)]


def combined(group: dist.ProcessGroup, clients: list[Client], method: str, **options: Any) -> Aggregator:
    own = Aggregator(method, **options)
    for each in of_rank(clients, group):
        own.add(each.update)
    before = own.clients
    result = own.combine(group)
    assert own.clients == before
    return result


def combine_all(group: dist.ProcessGroup, seed: int, missing: str) -> list[Any]:
    found = []
    for method, kind in KINDS:
        clients = round_for(method, seed)
        aggregator = combined(group, clients, method, accumulator=kind, missing=missing)
        found.append((aggregator.accumulator_kind, answers(aggregator.finalize(), stranger())))
    return found


@pytest.mark.parametrize(("size", "missing"), [(2, "renormalise"), (4, "zero")])
def test_combined_clients_are_those_of_one_round(
    ranks: Ranks, seed: int, size: int, missing: str
) -> None:
    found = ranks.run(size, combine_all, seed, missing)
    for place, (method, kind) in enumerate(KINDS):
        clients = round_for(method, seed)
        alone = streamed(clients, method, accumulator=kind, missing=missing)
        expected = answers(alone, stranger())
        for each in found:
            held, got = each[place]
            assert held == alone.report.accumulator
            if held == "stack":
                assert not differing(got, expected)
            assert got["clients"] == expected["clients"] and got["modules"] == expected["modules"]
            assert not differing(got, found[0][place][1]), (method, kind)
        got = found[0][place][1]
        for module in expected["modules"]:
            delta = got[f"delta {module}"][""]
            if held == "dense":
                check_sum(clients, module, delta, missing, size)
            elif missing == "renormalise":
                check_delta(clients, method, module, delta)
            assert torch.allclose(delta, expected[f"delta {module}"][""], rtol=1e-5, atol=1e-6)
        for each_client in clients:  # whole tensors are averaged too
            states = [where[f"client {each_client.name}"] for where in (got, expected)]
            for key in states[0]:
                if "score" in key:
                    torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-2, atol=1e-3)


def check_sum(
    clients: list[Client], module: str, delta: torch.Tensor, missing: str, ranks_: int
) -> None:
    """(K + r + 4) u sum_k p_k |s_k| |B_k| |A_k| as sums promise, and one rounding more a rank."""
    share = shares(clients, module, missing)
    having = [each for each in clients if each.name in share]
    terms = []
    for each in having:
        a, b = each.factors(module)
        terms.append(share[each.name] * abs(each.adapter.scaling(module)) * b.abs() @ a.abs())
    rank = max(each.adapter.rank(module) for each in having)
    bound = (len(clients) + rank + 4 + ranks_) * 2.0**-24 * torch.stack(terms).sum(0)
    dw = exact(clients, module, missing)
    slot = having[0].adapter.layout.by_module[module]
    assert bool(((as_matrix(delta, dw, slot.transposed) - dw).abs() <= bound).all())


def weighted(seed: int, weights: list[float]) -> list[Client]:
    return [
        client(f"c{k}", 4 + k, seed=seed + k, weight=weight, saved=True)
        for k, weight in enumerate(weights)
    ]


def combine_kinds(group: dist.ProcessGroup, seed: int, weights: list[float]) -> list[torch.Tensor]:
    """The first rank has sums, the second factors, the others nobody."""
    clients = weighted(seed, weights)
    own = Aggregator(accumulator="auto")
    if rank_of(group) == 0:
        dense = Aggregator(accumulator="dense")
        for each in clients[:2]:
            dense.add(each.update)
        own.load_state_dict(dense.state_dict())
    elif rank_of(group) == 1:
        for each in clients[2:4]:
            own.add(each.update)
    joined = own.combine(group)
    joined.add(clients[4].update)
    result = joined.finalize()
    assert result.report.accumulator == "dense"
    return [result.delta(module) for module in all_modules(clients)]


@pytest.mark.parametrize(
    "weights", [[1, 2, 3, 4, 5], [1e-30, 2e-30, 1e25, 2e25, 1], [1e30, 1, 1e-30, 1, 1e30]]
)
def test_sums_and_factors_are_joined_whatever_their_units(
    ranks: Ranks, seed: int, weights: list[float]
) -> None:
    clients = weighted(seed, weights)
    found = ranks.run(4, combine_kinds, seed, weights)
    for module, *deltas in zip(all_modules(clients), *found, strict=True):
        assert all(torch.equal(delta, deltas[0]) for delta in deltas)
        dw = exact(clients, module)
        assert (deltas[0].double() - dw).norm() <= 1e-6 * dw.norm()


def refuse(group: dist.ProcessGroup, seed: int) -> list[Any]:
    clients, rank = mixed_round(seed), rank_of(group)
    twice = Aggregator()
    for each in clients[rank : rank + 2]:
        twice.add(each.update)
    unlike = Aggregator(missing="zero" if rank else "renormalise")
    unlike.add(clients[rank].update)
    narrow = Aggregator(max_memory=20_000)
    narrow.add(client(f"n{rank}", 4, seed=seed).update)
    found = [refusal(lambda each=each: each.combine(group)) for each in (twice, unlike, narrow)]
    assert twice.clients == tuple(each.name for each in clients[rank : rank + 2])
    return [*found, Aggregator().combine(group).clients]


def test_what_cannot_be_combined_is_refused_by_all(ranks: Ranks, seed: int) -> None:
    found = ranks.run(3, refuse, seed)
    assert found == [found[0]] * 3
    twice, unlike, narrow, nobody = found[0]
    assert twice[0] == "InvalidInput" and "'c1'" in twice[1] and "in the round already" in twice[1]
    assert unlike[0] == "InvalidInput" and "zero" in unlike[1]
    assert narrow is None or narrow[0] == "MemoryBudgetExceeded"
    assert nobody == ()


def hold(group: dist.ProcessGroup, seed: int) -> tuple[int, int]:
    shapes = {f"layers.{k}.proj": (128, 128) for k in range(8)}
    own = Aggregator(accumulator="dense")
    own.add(client(f"c{rank_of(group)}", 4, seed=seed, modules=shapes).update)
    joined = own.combine(group)
    return own.memory, joined.memory


def test_a_rank_holds_its_share_of_the_sums(ranks: Ranks, seed: int) -> None:
    for own, share in ranks.run(4, hold, seed):
        assert share * 4 == own
        assert math.isclose(own, 8 * 128 * 128 * 4)


def combine_condensed(group: dist.ProcessGroup, seed: int) -> list[Any]:
    from fastagg.rounds import memory_plan

    held = Aggregator()
    for each in of_rank(mixed_round(seed), group):
        held.add(each.update)
    held.condense(1)
    stack = (held.accumulator_kind, refusal(lambda: held.combine(group)))
    worth, memory_plan.WORTH_CHANGING = memory_plan.WORTH_CHANGING, 0
    try:
        for number in range(40):
            held.add(client(f"light {number} of {rank_of(group)}", 16, weight=0.0, seed=seed).update)
    finally:
        memory_plan.WORTH_CHANGING = worth
    return [stack, (held.accumulator_kind, refusal(lambda: held.combine(group)))]


def test_what_was_condensed_is_not_parted_by_modules(ranks: Ranks, seed: int) -> None:
    """Its error would be lost on the way."""
    for stack, dense in ranks.run(2, combine_condensed, seed):
        for kind, found in (("stack", stack), ("dense", dense)):
            assert found[0] == kind
            assert found[1] is not None and found[1][0] == "InvalidInput" and "condensed" in found[1][1]
