"""A tree of servers whose inner nodes send a truncation up: what is kept, and what is stated."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from equations import (  # noqa: F401
    SAVED,
    SHAPES,
    Client,
    all_modules,
    as_matrix,
    client,
    exact,
    mixed_round,
    one_thread,
    optimal_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastagg import Aggregate, Aggregator
from fastagg.accumulators import StackAccumulator
from fastagg.errors import FastAggError, InvalidInput, MemoryBudgetExceeded
from fastagg.report import Report

RANKS = [2, 4, 8, 16]
# Beside an optimum: the promise of an exact route, and the rounding of the factors to float32.
EXCESS = 3e-6
# Of a stated error that is rounding only.
ROUNDING = 5e-6


def added(clients: Sequence[Client], **options: object) -> Aggregator:
    aggregator = Aggregator(**options)  # type: ignore[arg-type]
    for each in clients:
        aggregator.add(each.update)
    return aggregator


def node(
    parts: Sequence[Aggregator | Client], rank: int | None, **options: object
) -> Aggregator:
    """A server that clients and other servers send to; each sends its state, as over a wire."""
    aggregator = Aggregator(**options)  # type: ignore[arg-type]
    for part in parts:
        if isinstance(part, Client):
            aggregator.add(part.update)
        else:
            received = Aggregator(**options)  # type: ignore[arg-type]
            received.load_state_dict(copy.deepcopy(part.state_dict()))
            aggregator.merge(received)
    if rank is not None:
        aggregator.condense(rank)
    return aggregator


def held(result: Aggregate, module: str) -> torch.Tensor:
    """dW that the round holds, (m, n) in float64."""
    factors = result.factors(module)
    assert factors is not None
    a, b = factors
    return b @ a


def stated(result: Aggregate, module: str) -> float:
    """The stated error as a distance."""
    return result.condensed_error(module) * float(held(result, module).norm())


def snapshot(aggregator: Aggregator) -> dict[str, object]:
    return copy.deepcopy(aggregator.state_dict())


def same(left: dict[str, object], right: dict[str, object]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        for key, value in left.items()
    )


def bits(result: Aggregate, clients: Sequence[Client]) -> list[bytes]:
    return [result.adapter(client=each.name).flat.numpy().tobytes() for each in clients]


def alike(count: int, seed: int, rank: int = 4, **options: object) -> list[Client]:
    return [client(f"c{k:02}", rank, seed=seed + k, weight=1.0 + k, **options) for k in range(count)]  # type: ignore[arg-type]


# What is kept


@pytest.mark.parametrize("missing", ["renormalise", "zero"])
@pytest.mark.parametrize("rank", RANKS)
def test_one_level_keeps_the_best_approximation(seed: int, rank: int, missing: str) -> None:
    clients = mixed_round(seed, (torch.float32, torch.bfloat16))
    aggregator = node(clients, rank, missing=missing)
    assert aggregator.clients == tuple(each.name for each in clients)
    result = aggregator.finalize()
    for module in all_modules(clients):
        whole = exact(clients, module, missing)
        norm, error = float(whole.norm()), float((whole - held(result, module)).norm())
        assert torch.linalg.matrix_rank(held(result, module), rtol=1e-9) <= rank
        assert optimal_error(whole, rank) - 1e-9 * norm <= error
        assert error <= optimal_error(whole, rank) + EXCESS * norm
        assert error <= stated(result, module) <= error + ROUNDING * norm


@pytest.mark.parametrize("route", ["gram", "qr", "randomized", "dense"])
def test_the_stated_error_holds_by_every_route(seed: int, route: str) -> None:
    clients = mixed_round(seed)
    result = node(clients, 6, route=route).finalize()
    for module in all_modules(clients):
        error = float((exact(clients, module) - held(result, module)).norm())
        assert error <= stated(result, module) <= error + ROUNDING * float(held(result, module).norm())


@pytest.mark.parametrize("missing", ["renormalise", "zero"])
def test_nothing_is_lost_where_the_rank_suffices(seed: int, missing: str) -> None:
    clients = mixed_round(seed, (torch.float32, torch.float16))
    flat = added(clients, missing=missing).finalize()
    left, right = node(clients[:2], 40, missing=missing), node(clients[2:], 40, missing=missing)
    root = node([left, right], 40, missing=missing)
    result = root.finalize()
    for module in all_modules(clients):
        whole = exact(clients, module, missing)
        assert (whole - held(result, module)).norm() <= 1e-6 * whole.norm()
        assert result.condensed_error(module) <= ROUNDING
    for each in clients:
        got, expected = result.adapter(client=each.name), flat.adapter(client=each.name)
        assert got.layout.digest == expected.layout.digest
        for module in each.modules:
            delta, other = got.delta(module), expected.delta(module)
            assert (delta - other).norm() <= 3e-3 * other.norm()  # float16's rounding


def test_a_round_below_the_rank_is_left_as_it_is(seed: int) -> None:
    clients = alike(3, seed)
    aggregator = added(clients)
    before = snapshot(aggregator)
    aggregator.condense(12)
    assert same(before, aggregator.state_dict())
    empty = Aggregator()
    empty.condense(4)
    assert empty.clients == ()
    aggregator.condense(11)
    once = snapshot(aggregator)
    aggregator.condense(11)
    assert same(once, aggregator.state_dict())


def test_whole_tensors_are_summed_though_no_factor_is_truncated(seed: int) -> None:
    clients = alike(3, seed, saved=True)
    aggregator = node(clients, 12)
    assert aggregator.memory < added(clients).memory
    result = aggregator.finalize()
    assert all(result.condensed_error(module) <= ROUNDING for module in result.modules)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[Client], list[list[list[int]]], int, str]:
    """Clients of all kinds, a tree of three levels over them, a rank to keep, and ``missing``."""
    count = draw(st.integers(1, 7))
    names = list(SHAPES)
    clients = []
    for k in range(count):
        own = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        clients.append(
            client(
                f"c{k}",
                draw(st.sampled_from([1, 2, 4, 8, 16])),
                seed=draw(st.integers(0, 2**20)),
                weight=draw(st.sampled_from([0.0, 1e-3, 1.0, 17.0, 4e5])),
                alpha=draw(st.sampled_from([1.0, 16.0])),
                modules={name: SHAPES[name] for name in own},
                saved=draw(st.booleans()),
                zero_b=draw(st.integers(0, 5)) == 0,
            )
        )
    # The last weighs, and has all: a module or tensor without any weight is refused in the end.
    clients.append(client("last", 4, seed=draw(st.integers(0, 2**20)), saved=True))
    branches = draw(st.integers(1, 3))
    tree: list[list[list[int]]] = [[[], []] for _ in range(branches)]
    for k in range(len(clients)):
        tree[draw(st.integers(0, branches - 1))][draw(st.integers(0, 1))].append(k)
    return clients, tree, draw(st.sampled_from([1, 2, 5, 16])), draw(
        st.sampled_from(["renormalise", "zero"])
    )


@settings(max_examples=60, deadline=None)
@given(trees())
def test_the_error_of_a_tree_is_within_the_stated_bound(
    case: tuple[list[Client], list[list[list[int]]], int, str],
) -> None:
    clients, tree, rank, missing = case
    leaves = [
        [node([clients[k] for k in leaf], rank, missing=missing) for leaf in branch] for branch in tree
    ]
    inner = [node(branch, rank, missing=missing) for branch in leaves]
    result = node(inner, None, missing=missing).finalize()
    assert result.clients == tuple(sorted(each.name for each in clients))
    for module in all_modules(clients):
        whole = exact(clients, module, missing)
        bound = stated(result, module)
        assert (whole - held(result, module)).norm() <= bound + 1e-12 * whole.norm()
    for each in clients:
        adapter = result.adapter(client=each.name)
        assert adapter.layout.digest == each.adapter.layout.digest
        for module in each.modules:
            whole, own = exact(clients, module, missing), adapter.rank(module)
            delta = as_matrix(adapter.delta(module), whole, transposed=False)
            # |dW - T(kept)| <= |dW - kept| + |kept - T(dW)| <= the optimum and twice the bound.
            most = optimal_error(whole, own) + 2 * stated(result, module)
            assert (whole - delta).norm() <= most + EXCESS * whole.norm()
    having = [each for each in clients if SAVED in each.adapter.state_dict()]
    total = sum(each.weight for each in having)
    expected = sum(each.weight / total * each.adapter.state_dict()[SAVED].double() for each in having)
    got = result.adapter(client="last").state_dict()[SAVED]
    torch.testing.assert_close(got, expected.float(), rtol=2e-7, atol=1e-7)  # type: ignore[union-attr]


def test_averages_of_large_whole_tensors(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastagg.accumulators.whole.BLOCK", 50)  # of 120: three blocks, in float32
    clients = alike(6, seed, saved=True)
    root = node([node(clients[:2], 4), node(clients[2:5], 4), clients[5]], 4)
    total = sum(each.weight for each in clients)
    expected = sum(each.weight / total * each.adapter.state_dict()[SAVED].double() for each in clients)
    got = root.finalize().adapter(client="c00").state_dict()[SAVED]
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e290])
@pytest.mark.parametrize("accumulator", ["stack", "dense"])
def test_weights_of_any_scale(
    seed: int, scale: float, accumulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [client(f"c{k}", 4, weight=w * scale, seed=seed + k, saved=True)
               for k, w in enumerate((1, 5, 2, 3))]
    root = node([node(clients[:2], 3), node(clients[2:3], 3)], None)
    if accumulator == "dense":
        monkeypatch.setattr("fastagg.rounds.memory_plan.WORTH_CHANGING", 0)
        for k in range(20):
            root.add(client(f"light{k}", 16, weight=0.0, seed=seed).update)
    root.add(clients[3].update)
    assert root.accumulator_kind == accumulator
    result = root.finalize()
    for module in result.modules:
        whole = exact(clients, module)
        error = (whole - as_matrix(result.delta(module), whole, transposed=False)).norm()
        bound = result.condensed_error(module) * result.delta(module).norm()
        assert error <= bound * (1 + 1e-6) + 1e-6 * whole.norm()
        assert 0.1 < result.condensed_error(module) < 2


def test_clients_without_weight_may_find_company_later(seed: int) -> None:
    idle = [client(f"idle{k}", 4, weight=0.0, seed=seed + k, saved=True) for k in range(3)]
    branch = node(idle, 2)
    with pytest.raises(InvalidInput, match="all weights are zero"):
        node([branch], None).finalize()
    active = client("one", 4, seed=seed + 9, saved=True)
    result = node([branch, active], None).finalize()
    for module in result.modules:
        whole = active.delta(module)
        assert (whole - held(result, module)).norm() <= 1e-6 * whole.norm()
        assert result.condensed_error(module) <= ROUNDING
    sent, got = (each.state_dict()[SAVED] for each in (active.adapter, result.adapter(client="idle0")))
    torch.testing.assert_close(got, sent)


def test_updates_that_cancel(seed: int) -> None:
    """The error of a sum that is nothing beside its terms is stated beside the terms' rounding."""
    one = client("a", 8, seed=seed)
    sent = one.adapter.state_dict()
    state = {key: -value if "lora_B" in key else value for key, value in sent.items()}
    other = dataclasses.replace(one, name="b", adapter=type(one.adapter)(state, one.adapter.config))
    result = node([node([one, other], 4), client("c", 4, seed=seed + 1)], None).finalize()
    for module in result.modules:
        whole = exact([one, other, client("c", 4, seed=seed + 1)], module)
        assert (whole - held(result, module)).norm() <= stated(result, module)
        assert result.condensed_error(module) <= 1e-5


# A dense accumulator


def test_a_round_that_became_dense_is_condensed_to_factors(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastagg.rounds.memory_plan.WORTH_CHANGING", 0)
    clients = alike(12, seed, 16, saved=True)
    aggregator = added(clients)
    assert aggregator.accumulator_kind == "dense"
    dense = aggregator.memory
    aggregator.condense(5)
    assert aggregator.accumulator_kind == "stack"
    assert aggregator.memory < dense
    more = client("more", 4, seed=seed + 40, weight=9.0, saved=True)
    aggregator.add(more.update)
    result = aggregator.finalize()
    branch = sum(each.weight for each in clients)
    total = branch + more.weight
    for module in result.modules:
        part = exact(clients, module)
        error = (exact([*clients, more], module) - held(result, module)).norm()
        assert abs(error - branch / total * optimal_error(part, 5)) <= 1e-3 * part.norm()
        assert error <= stated(result, module) + 1e-6 * part.norm()


def test_errors_stay_with_a_round_that_becomes_dense(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = alike(14, seed, 16, saved=True)
    branch = node(clients[:3], 6)
    monkeypatch.setattr("fastagg.rounds.memory_plan.WORTH_CHANGING", 0)
    # A stack that has condensed turns dense; sums take a branch in; sums of a state, and sums of sums.
    turned = node([branch, *clients[3:12]], None)
    taken = node([*clients[3:12], branch], None)
    assert turned.accumulator_kind == taken.accumulator_kind == "dense"
    restored = Aggregator()
    restored.load_state_dict(turned.state_dict())
    joined = added(clients[12:])
    assert joined.accumulator_kind == "dense"
    joined.merge(restored)
    for result, members in (
        (turned.finalize(), clients[:12]), (taken.finalize(), clients[:12]),
        (joined.finalize(), clients),
    ):
        for module in result.modules:
            whole = exact(members, module)
            delta = as_matrix(result.delta(module), whole, transposed=False)
            bound = result.condensed_error(module) * float(delta.norm())
            share = sum(each.weight for each in clients[:3]) / sum(each.weight for each in members)
            assert (whole - delta).norm() <= bound + 1e-6 * whole.norm()
            assert bound == pytest.approx(
                share * optimal_error(exact(clients[:3], module), 6), rel=1e-3
            )


def test_errors_in_sums_keep_up_with_a_weight_far_above_the_others(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    light = alike(4, seed, 16)
    branch = node(light, 6)
    monkeypatch.setattr("fastagg.rounds.memory_plan.WORTH_CHANGING", 0)
    weight = 2.0**70
    heavy = [client(f"h{k}", 16, seed=seed + 50 + k, weight=weight) for k in range(8)]
    root = node([branch, *heavy], None)
    assert root.accumulator_kind == "dense"
    result = root.finalize()
    share = sum(each.weight for each in light) / (8 * weight)
    for module in result.modules:
        cost = result.condensed_error(module) * float(result.delta(module).norm())
        assert cost == pytest.approx(share * optimal_error(exact(light, module), 6), rel=1e-3)


# Order, state, memory


def test_bits_do_not_depend_on_the_order_of_the_branches(seed: int) -> None:
    clients = alike(9, seed, saved=True)
    branches = [node(clients[k : k + 3], 5) for k in (0, 3, 6)]
    expected = bits(node(branches, None).finalize(), clients)
    assert bits(node(branches[::-1], None).finalize(), clients) == expected
    pair = node([node([branches[2], branches[0]], None), branches[1]], None)
    assert bits(pair.finalize(), clients) == expected


@pytest.mark.parametrize("missing", ["renormalise", "zero"])
def test_a_restart_changes_no_bit(seed: int, missing: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors import safe_open
    from safetensors.torch import save_file

    clients = mixed_round(seed, (torch.float32, torch.bfloat16))
    before = node([node(clients[:2], 5, missing=missing), clients[2]], None, missing=missing)
    state = before.state_dict()
    texts = {key: value for key, value in state.items() if isinstance(value, str)}
    save_file({key: value for key, value in state.items() if key not in texts},
              tmp_path / "state.safetensors", metadata=texts)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        read = {key: file.get_tensor(key) for key in file.keys()} | file.metadata()  # noqa: SIM118
    after = Aggregator(missing=missing)
    after.load_state_dict(read)
    assert same(state, after.state_dict())
    assert (after.memory, after.clients) == (before.memory, before.clients)
    for aggregator in (before, after):
        for each in clients[3:]:
            aggregator.add(each.update)
    results = before.finalize(), after.finalize()
    assert bits(results[0], clients) == bits(results[1], clients)
    for module in results[0].modules:
        assert results[0].condensed_error(module) == results[1].condensed_error(module)
    assert results[0].report.modules[0].condensed_error == results[1].report.modules[0].condensed_error


@pytest.mark.parametrize("accumulator", ["stack", "dense"])
def test_a_state_from_before_there_was_condensing_is_read(seed: int, accumulator: str) -> None:
    clients = alike(3, seed, saved=True)
    state = added(clients, accumulator=accumulator).state_dict()
    header = json.loads(str(state["fastagg"]))
    assert header.pop("version") == 2
    header.pop("condensed", None)
    header.get("sums", {}).pop("discarded", None)
    old = Aggregator(accumulator=accumulator)
    old.load_state_dict({**state, "fastagg": json.dumps({"version": 1, **header})})
    expected = bits(added(clients, accumulator=accumulator).finalize(), clients)
    assert bits(old.finalize(), clients) == expected


def test_a_damaged_state_is_refused_whole(seed: int) -> None:
    clients = mixed_round(seed)
    aggregator = added(clients[4:])
    before = snapshot(aggregator)
    good = node([node(clients[:2], 5), node(clients[2:4], 5)], None).state_dict()

    def changed(field: str, value: object, group: int = 0) -> dict[str, object]:
        header = json.loads(str(good["fastagg"]))
        header["condensed"][group][field] = value
        return {**good, "fastagg": json.dumps(header)}

    fields = json.loads(str(good["fastagg"]))["condensed"][0]
    short = dict(list(fields["ranks"].items())[1:])
    flat = good["condensed.0"]
    assert isinstance(flat, torch.Tensor)
    poisoned = flat.clone()
    poisoned[-4:] = torch.tensor([float("nan")]).view(torch.uint8)
    broken: list[dict[str, object]] = [
        {**good, "condensed.0": flat[:-1]},
        {**good, "condensed.0": poisoned},
        {key: value for key, value in good.items() if key != "condensed.1"},
        changed("clients", ["c0", "c9"]), changed("clients", []), changed("clients", ["c1", "c0"]),
        changed("clients", ["c0", "c2"], 1), changed("clients", ["c0"]),
        changed("ranks", short), changed("ranks", dict.fromkeys(fields["ranks"], 0)),
        changed("ranks", {**fields["ranks"], "other": 3}),
        changed("weights", fields["weights"][1:]), changed("weights", [-1.0] * len(fields["weights"])),
        changed("errors", [float("nan")] * len(fields["errors"])), changed("errors", None),
        changed("whole", []), changed("whole_weights", [float("inf")]),
    ]
    for state in broken:
        with pytest.raises(InvalidInput, match="cannot be continued"):
            aggregator.load_state_dict(state)
        assert same(before, aggregator.state_dict())


def test_memory_is_counted_by_what_is_held(seed: int) -> None:
    clients = alike(24, seed, 8)
    last = client("last", 8, seed=seed + 99)
    headers = [(each.name, each.adapter.layout, each.adapter.config) for each in [*clients, last]]
    with pytest.raises(MemoryBudgetExceeded) as caught:
        Aggregator(accumulator="stack", route="gram", max_memory=1).plan_for(headers)
    options = {"accumulator": "stack", "route": "gram", "max_memory": caught.value.needed // 4}
    root = Aggregator(**options)
    for k in range(0, 24, 4):
        branch = node(clients[k : k + 4], 8, **options)
        root.merge(branch)
        root.condense(8)
    root.add(last.update)  # R is 8 + 8 rows here, not 200
    assert root.memory < added(clients).memory / 8
    assert len(root.clients) == 25


def test_condensing_beyond_max_memory_changes_nothing(seed: int) -> None:
    clients = alike(4, seed, 8)
    aggregator = added(clients)
    aggregator._plan = dataclasses.replace(aggregator._plan, budget=aggregator.memory + 1)
    before = snapshot(aggregator)
    with pytest.raises(MemoryBudgetExceeded) as caught:
        aggregator.condense(8)
    assert same(before, aggregator.state_dict())
    aggregator._plan = dataclasses.replace(aggregator._plan, budget=caught.value.needed)
    aggregator.condense(8)
    assert aggregator.memory < added(clients).memory


# The report


def test_the_report_states_the_error(seed: int) -> None:
    clients = alike(4, seed, 8)
    result = node([node(clients, 6)], None).finalize()
    assert all(module.condensed_error is None for module in result.report.modules)
    result.adapter(rank=6)
    for module in result.report.modules:
        assert module.condensed_error == pytest.approx(result.condensed_error(module.module), rel=1e-5)
        assert module.rank_sum == 32
    again = Report.from_json(result.report.to_json())
    assert again == result.report
    exactly = added(clients).finalize()
    exactly.adapter(rank=6)
    assert {module.condensed_error for module in exactly.report.modules} == {0.0}


def test_a_report_from_before_there_was_condensing_is_read(seed: int) -> None:
    fields = added(alike(2, seed)).finalize().report.to_dict()
    old = copy.deepcopy(fields)
    old["schema"] = 1
    for module in old["modules"]:
        module.pop("condensed_error")
    assert Report.from_dict(old).to_dict() == fields
    with pytest.raises(ValueError, match="schema"):
        Report.from_dict({**fields, "schema": 3})


# What is refused


@pytest.mark.parametrize(("method", "why"), [
    ("flora", "own factors"), ("fedit", "averages the factors"), ("zeropad", "averages the factors"),
    ("hetlora", "averages the factors"),
])
def test_methods_that_do_not_follow_from_the_sum_refuse(seed: int, method: str, why: str) -> None:
    aggregator = added(alike(3, seed), method=method)
    before = snapshot(aggregator)
    with pytest.raises(InvalidInput, match=why):
        aggregator.condense(4)
    assert same(before, aggregator.state_dict())


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4", None])
def test_no_rank_is_refused(seed: int, rank: object) -> None:
    with pytest.raises(InvalidInput, match="not a rank"):
        added(alike(3, seed)).condense(rank)  # type: ignore[arg-type]


def test_a_dense_accumulator_asked_for_by_name_refuses(seed: int) -> None:
    with pytest.raises(InvalidInput, match="accumulator") as caught:
        added(alike(3, seed), accumulator="dense").condense(4)
    assert caught.value.field == "accumulator"


def test_a_client_of_two_branches_is_refused(seed: int) -> None:
    clients = alike(5, seed)
    root, other = node(clients[:3], 4), node(clients[2:], 4)
    before = snapshot(root)
    with pytest.raises(InvalidInput, match="in the round already") as caught:
        root.merge(other)
    assert caught.value.client == "c02"
    with pytest.raises(InvalidInput, match="in the round already"):
        root.add(clients[0].update)
    assert same(before, root.state_dict())


def test_there_is_no_stack_of_condensed_clients(seed: int) -> None:
    result = node(alike(3, seed), 4).finalize()
    with pytest.raises(InvalidInput, match="no stack of all"):
        result.stacked()


def test_numbers_that_are_not_finite_change_nothing(seed: int) -> None:
    aggregator = added(alike(3, seed))
    flat = aggregator._accumulator.flats["c01"]  # type: ignore[union-attr]
    whole = flat.clone()
    flat[:4] = torch.tensor([float("nan")]).view(torch.uint8)
    with pytest.raises(InvalidInput, match="not finite") as caught:
        aggregator.condense(4)
    assert caught.value.client == "c01"
    flat.copy_(whole)
    assert same(snapshot(added(alike(3, seed))), aggregator.state_dict())


def test_weights_without_a_sum_change_nothing(seed: int) -> None:
    aggregator = added([client(f"c{k}", 4, seed=seed + k, weight=1.5e308) for k in range(2)])
    before = snapshot(aggregator)
    with pytest.raises(InvalidInput, match="sum of the weights"):
        aggregator.condense(4)
    assert same(before, aggregator.state_dict())


def test_ctrl_c_leaves_the_round_as_it_was(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator = added(alike(3, seed))
    before = snapshot(aggregator)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastagg.rounds.condensing._distance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aggregator.condense(4)
    monkeypatch.undo()
    assert same(before, aggregator.state_dict())
    branch = node(alike(6, seed)[3:], 4)
    real = StackAccumulator.merge

    def interrupted_late(*stacks: StackAccumulator) -> None:
        real(*stacks)
        raise KeyboardInterrupt

    monkeypatch.setattr(StackAccumulator, "merge", interrupted_late)
    with pytest.raises(KeyboardInterrupt):
        aggregator.merge(branch)
    monkeypatch.undo()
    assert same(before, aggregator.state_dict())
    monkeypatch.setattr("fastagg.planning.roster.Roster.admit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aggregator.merge(branch)
    monkeypatch.undo()
    with pytest.raises(FastAggError, match="interrupted"):
        aggregator.finalize()


def test_the_stated_errors_add_up_over_the_levels(seed: int) -> None:
    """sum_G W_G / D e_G, and what the next level discards of that."""
    clients = alike(6, seed, 8)
    branches = [clients[:2], clients[2:]]
    leaves = [node(branch, 5).finalize() for branch in branches]
    weights = np.array([sum(each.weight for each in branch) for branch in branches])
    shares = weights / weights.sum()
    top = node([node(branch, 5) for branch in branches], 5).finalize()
    for module in top.modules:
        below = float(shares @ [stated(leaf, module) for leaf in leaves])
        kept = sum(
            share * held(leaf, module) for share, leaf in zip(shares, leaves, strict=True)
        )
        assert isinstance(kept, torch.Tensor)
        assert stated(top, module) == pytest.approx(below + optimal_error(kept, 5), rel=1e-4)
