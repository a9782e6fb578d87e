"""Streaming: order, all or nothing, trees, restarts, budgets."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter, make_folder
from equations import SHAPES, Client, client, exact, mixed_round, one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import fastagg
import fastagg.rounds.state
from fastagg import Aggregator, ClientUpdate
from fastagg.accumulators import StackAccumulator
from fastagg.byte_sizes import parse_bytes
from fastagg.errors import FastAggError, InvalidInput, MemoryBudgetExceeded

METHODS = ["flora", "flexlora", "zeropad", "hetlora"]


def added(clients: list[Client], method: str = "flexlora", **options: object) -> Aggregator:
    aggregator = Aggregator(method, **options)  # type: ignore[arg-type]
    for each in clients:
        aggregator.add(each.update)
    return aggregator


def bits(result: fastagg.Aggregate, clients: list[Client]) -> list[bytes]:
    return [result.adapter(client=each.name).flat.numpy().tobytes() for each in clients]


def for_each(function: Callable[[object], object], values: list[object]) -> None:
    for value in values:
        function(value)


def snapshot(aggregator: Aggregator) -> dict[str, object]:
    return copy.deepcopy(aggregator.state_dict())


def same(left: dict[str, object], right: dict[str, object]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        for key, value in left.items()
    )


# The order of arrival


@pytest.mark.parametrize("method", ["flora", "flexlora"])
def test_bits_do_not_depend_on_the_order_of_arrival(seed: int, method: str) -> None:
    clients = mixed_round(seed, (torch.float32, torch.bfloat16))
    expected = bits(added(clients, method).finalize(), clients)
    for order in list(itertools.permutations(clients))[1::29]:
        assert bits(added(list(order), method).finalize(), clients) == expected


@pytest.mark.parametrize("method", ["flora", "flexlora", "zeropad", "hetlora"])
def test_bits_do_not_depend_on_the_number_of_threads(seed: int, method: str) -> None:
    clients = mixed_round(seed, (torch.float32, torch.bfloat16))
    expected = bits(added(clients, method).finalize(), clients)
    torch.set_num_threads(2)
    assert bits(added(clients, method).finalize(), clients) == expected


def test_dense_sums_in_any_order_agree_to_rounding(seed: int) -> None:
    clients = mixed_round(seed)
    forward = added(clients, accumulator="dense").finalize()
    backward = added(clients[::-1], accumulator="dense").finalize()
    for module in forward.modules:
        bound = sum(
            each.weight / sum(other.weight for other in clients if module in other.modules)
            * each.adapter.scaling(module)
            * (each.factors(module)[1].abs() @ each.factors(module)[0].abs())
            for each in clients if module in each.modules
        )
        steps = len(clients) + max(each.adapter.rank(module) for each in clients
                                   if module in each.modules) + 4
        got = forward.delta(module).double(), backward.delta(module).double()
        flat = [delta.flatten(1) if delta.shape[0] == bound.shape[0] else delta.T for delta in got]
        assert ((flat[0] - exact(clients, module)).abs() <= steps * 2**-24 * bound).all()
        assert ((flat[0] - flat[1]).abs() <= 2 * steps * 2**-24 * bound).all()


@pytest.mark.parametrize("method", ["zeropad", "hetlora"])
def test_means_in_any_order_agree_to_rounding(seed: int, method: str) -> None:
    clients = mixed_round(seed)
    forward, backward = added(clients, method).finalize(), added(clients[::-1], method).finalize()
    for module in forward.modules:
        torch.testing.assert_close(forward.delta(module), backward.delta(module), rtol=1e-6,
                                   atol=1e-7)


def test_weights_of_any_scale(seed: int) -> None:
    for accumulator in ("stack", "dense"):
        for scale in (1e-300, 1e-30, 1.0, 1e30, 1e290):
            clients = [client(f"c{k}", 4, weight=w * scale, seed=seed + k, saved=True)
                       for k, w in enumerate((1, 5, 2))]
            result = added(clients, accumulator=accumulator).finalize()
            for module in result.modules:
                expected = exact(clients, module)
                assert (result.delta(module) - expected).norm() <= 1e-6 * expected.norm()
            assert result.adapter(client="c0").check_finite() is None


def test_a_weight_far_above_the_others_takes_over(seed: int) -> None:
    clients = [client(f"c{k}", 4, weight=w, seed=seed + k, saved=True)
               for k, w in enumerate((1e-30, 1.0, 1e30))]
    for accumulator in ("stack", "dense"):
        result = added(clients, accumulator=accumulator).finalize()
        for module in result.modules:
            expected = exact(clients, module)
            assert (result.delta(module) - expected).norm() <= 1e-6 * expected.norm()


# All or nothing


def refused_updates(seed: int) -> dict[str, tuple[ClientUpdate, str]]:
    """Updates that do not fit to a round of SHAPES; the last module is the bad one."""
    last = list(SHAPES)[-1]
    nan = client("nan", 4, seed=seed)
    nan.adapter.state_dict()[f"base_model.model.{last}.lora_B.weight"][3, 1] = float("nan")
    wide = {**SHAPES, last: (40, 25)}
    turned = make_adapter({last: SHAPES[last]}, config_extra={"fan_in_fan_out": True}, name="t")
    conv = {"base_model.model." + last + ".lora_A.weight": torch.randn(8, 6, 2, 2),
            "base_model.model." + last + ".lora_B.weight": torch.randn(40, 8, 1, 1)}
    kind = make_adapter({"other": (4, 4)}, extra_tensors=conv, name="k")
    whole = {"base_model.model.score.weight": torch.randn(5, 25)}
    return {
        "nan": (nan.update, "NaN or infinite"),
        "duplicate": (client("c0", 4, seed=seed).update, "in the round already"),
        "shape": (client("w", 4, seed=seed, modules=wide).update, "another shape"),
        "base": (client("b", 4, seed=seed, base_model="other").update, "different base models"),
        "turned": (ClientUpdate(turned), "fan_in_fan_out"),
        "kind": (ClientUpdate(kind), "kind of module"),
        "whole": (ClientUpdate(make_adapter(SHAPES, extra_tensors=whole, name="w")),
                  "whole tensor has another shape"),
        "pissa": (ClientUpdate(make_adapter(SHAPES, config_extra={"init_lora_weights": "pissa"},
                                            name="p")), "initialisation"),
    }


@pytest.mark.parametrize("reason", list(refused_updates(0)))
@pytest.mark.parametrize("accumulator", ["stack", "dense", "means"])
def test_a_refused_update_changes_nothing(seed: int, accumulator: str, reason: str) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k, saved=True) for k in range(2)]
    if accumulator == "means":
        aggregator = added(clients, "zeropad")
    else:
        aggregator = added(clients, accumulator=accumulator)
    before = snapshot(aggregator)
    update, message = refused_updates(seed)[reason]
    with pytest.raises(InvalidInput, match=message) as caught:
        aggregator.add(update)
    assert caught.value.client == update.client_id
    assert same(before, aggregator.state_dict())
    assert aggregator.clients == ("c0", "c1")


def test_an_interrupted_sum_is_not_used(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(3)]
    aggregator = added(clients[:2], accumulator="dense")
    state = snapshot(aggregator)
    calls = iter([None, KeyboardInterrupt()])
    real = fastagg.ops.reconstruct_

    def interrupted(*arguments: object) -> None:
        if (error := next(calls)) is not None:
            raise error
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("fastagg.ops.reconstruct_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aggregator.add(clients[2].update)
    monkeypatch.undo()
    for use in (aggregator.finalize, aggregator.state_dict):
        with pytest.raises(FastAggError, match="interrupted"):
            use()
    aggregator.load_state_dict(state)
    aggregator.add(clients[2].update)
    assert bits(aggregator.finalize(), clients) == bits(
        added(clients, accumulator="dense").finalize(), clients
    )


def test_an_interrupted_copy_leaves_the_stack_as_it_was(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(2)]
    aggregator = added(clients[:1])
    before = snapshot(aggregator)

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fastagg.accumulators.StackAccumulator.add", fails)
    with pytest.raises(MemoryError):
        aggregator.add(clients[1].update)
    monkeypatch.undo()
    assert same(before, aggregator.state_dict())
    aggregator.add(clients[1].update)
    assert aggregator.clients == ("c0", "c1")


@pytest.mark.parametrize("options", [{}, {"accumulator": "dense"}, {"method": "zeropad"}], ids=str)
def test_ctrl_c_during_the_admission_is_told(
    seed: int, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(3)]
    aggregator = added(clients[:2], **options)
    state = snapshot(aggregator)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for change in (lambda: aggregator.add(clients[2].update),
                   lambda: aggregator.merge(added(clients[2:], **options))):
        other = added(clients[2:], **options)
        monkeypatch.setattr("fastagg.planning.roster.Roster.admit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            aggregator.merge(other)
        monkeypatch.undo()
        with pytest.raises(FastAggError, match="interrupted"):
            aggregator.finalize()
        aggregator.load_state_dict(state)
        change()
        assert aggregator.clients == ("c0", "c1", "c2")
        aggregator.load_state_dict(state)


def test_ctrl_c_during_the_division_is_told(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [client(f"c{k}", 4, weight=3, seed=seed + k) for k in range(2)]
    aggregator = added(clients, accumulator="dense")
    state = snapshot(aggregator)
    expected = bits(added(clients, accumulator="dense").finalize(), clients)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastagg.accumulators.dense.DenseSource.__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aggregator.finalize()
    monkeypatch.undo()
    with pytest.raises(FastAggError, match="interrupted"):
        aggregator.finalize()
    aggregator.load_state_dict(state)
    # Before the division nothing was changed.
    monkeypatch.setattr("fastagg.accumulators.dense.check_totals", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aggregator.finalize()
    monkeypatch.undo()
    assert bits(aggregator.finalize(), clients) == expected


def test_a_file_rewritten_while_it_is_copied_is_refused(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aggregator = added([client("c0", 4, seed=seed)])
    before = snapshot(aggregator)
    update = ClientUpdate(make_folder(tmp_path / "c1", SHAPES))
    real = StackAccumulator.add

    def rewritten(*arguments: Any) -> None:
        real(*arguments)
        os.utime(tmp_path / "c1" / "adapter_model.safetensors", ns=(1, 1))

    monkeypatch.setattr(StackAccumulator, "add", rewritten)
    with pytest.raises(InvalidInput, match="was rewritten"):
        aggregator.add(update)
    assert same(before, aggregator.state_dict())
    assert aggregator.memory == client("c0", 4, seed=seed).adapter.nbytes


def test_the_adapter_may_change_after_it_was_added(seed: int) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(2)]
    expected = bits(added(clients).finalize(), clients)
    again = [client(f"c{k}", 4, seed=seed + k) for k in range(2)]
    aggregator = added(again)
    for each in again:
        for tensor in each.adapter.state_dict().values():
            tensor.zero_()
    assert bits(aggregator.finalize(), clients) == expected


# Weights


def test_all_weights_zero_are_refused_and_the_clients_kept(seed: int) -> None:
    for options in ({"accumulator": "stack"}, {"accumulator": "dense"}, {"method": "zeropad"}):
        aggregator = Aggregator(**options)  # type: ignore[arg-type]
        for k in range(2):
            aggregator.add(client(f"c{k}", 4, weight=0, seed=seed + k).update)
        with pytest.raises(InvalidInput, match="all weights are zero") as caught:
            aggregator.finalize()
        assert "examples" in str(caught.value)
        aggregator.add(client("c2", 4, weight=3, seed=seed).update)
        only = aggregator.finalize()
        expected = client("c2", 4, seed=seed)
        for module in only.modules:
            torch.testing.assert_close(only.delta(module).double(), expected.delta(module),
                                       rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulator", ["stack", "dense"])
def test_a_module_that_only_clients_of_weight_zero_have(seed: int, accumulator: str) -> None:
    some = dict(list(SHAPES.items())[:2])
    clients = [client("a", 4, seed=seed, modules=some), client("b", 4, weight=0, seed=seed)]
    with pytest.raises(InvalidInput, match="missing='zero'") as caught:
        added(clients, accumulator=accumulator).finalize()
    assert caught.value.module == sorted(set(SHAPES) - set(some))[0]
    result = added(clients, accumulator=accumulator, missing="zero").finalize()
    assert not result.delta(caught.value.module).any()


def test_an_empty_round_is_refused() -> None:
    with pytest.raises(InvalidInput, match="nothing to aggregate"):
        Aggregator().finalize()
    with pytest.raises(InvalidInput, match="nothing to aggregate"):
        fastagg.aggregate([])


def test_finalize_begins_a_new_round(seed: int) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(3)]
    aggregator = added(clients[:2])
    first = aggregator.finalize()
    assert aggregator.clients == ()
    assert aggregator.memory == 0
    aggregator.add(clients[0].update)
    aggregator.add(clients[2].update)
    second = aggregator.finalize()
    assert first.clients == ("c0", "c1")
    assert second.clients == ("c0", "c2")
    for module in SHAPES:
        expected = exact(clients[:2], module)
        assert (first.delta(module) - expected).norm() <= 1e-6 * expected.norm()


# Trees


@pytest.mark.parametrize("method", METHODS)
def test_trees_give_what_one_server_gives(seed: int, method: str) -> None:
    clients = mixed_round(seed)
    whole = added(clients, method).finalize()
    tree = added(clients[:2], method)
    branch = added(clients[2:3], method)
    branch.merge(added(clients[3:], method))
    before = snapshot(branch)
    tree.merge(branch)
    assert same(before, branch.state_dict())
    assert tree.clients == whole.clients
    merged = tree.finalize()
    if method in ("flora", "flexlora"):
        assert bits(merged, clients) == bits(whole, clients)
    for module in whole.modules:
        torch.testing.assert_close(merged.delta(module), whole.delta(module), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("missing", ["renormalise", "zero"])
def test_dense_trees(seed: int, missing: str) -> None:
    clients = mixed_round(seed)
    tree = added(clients[3:], accumulator="dense", missing=missing)
    tree.merge(added(clients[:3], accumulator="dense", missing=missing))
    result = tree.finalize()
    for module in result.modules:
        expected = exact(clients, module, missing)
        delta = result.delta(module).double().flatten(1)
        got = delta if delta.shape == expected.shape else delta.T
        assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_a_stack_joins_sums(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "auto" one server may have changed to dense already when the other has not."""
    clients = mixed_round(seed)
    stack, dense = added(clients[:2]), Aggregator()
    monkeypatch.setattr("fastagg.rounds.memory_plan.WORTH_CHANGING", 0)
    many = [client(f"d{k:02}", 16, seed=seed + k) for k in range(12)]
    for each in many:
        dense.add(each.update)
    monkeypatch.undo()
    assert dense.accumulator_kind == "dense"
    assert stack.accumulator_kind == "stack"
    everyone = clients[:2] + many
    for left, right in ((stack, dense), (dense, added(clients[:2]))):
        joined = Aggregator()
        joined.load_state_dict(left.state_dict())
        joined.merge(right)
        assert joined.accumulator_kind == "dense"
        result = joined.finalize()
        for module in SHAPES:
            expected = exact(everyone, module)
            assert (result.delta(module) - expected).norm() <= 1e-6 * expected.norm()


def test_sums_join_a_round_that_was_settled_for_the_stack(seed: int) -> None:
    clients = mixed_round(seed)
    settled = Aggregator()
    settled.expect([(each.name, each.adapter.layout, each.adapter.config) for each in clients[2:]])
    assert settled.accumulator_kind == "stack"
    sums = added(clients[:2], accumulator="dense")
    sums.accumulator = "auto"  # as one that has changed to dense
    settled.add(clients[2].update)
    settled.merge(sums)
    assert settled.accumulator_kind == "dense"
    for each in clients[3:]:
        settled.add(each.update)
    result = settled.finalize()
    for module in SHAPES:
        expected = exact(clients, module)
        assert (result.delta(module) - expected).norm() <= 1e-6 * expected.norm()


def test_a_settled_dense_round_is_merged(seed: int) -> None:
    clients = mixed_round(seed)
    settled = Aggregator(accumulator="dense")
    settled.expect([(each.name, each.adapter.layout, each.adapter.config) for each in clients[2:]])
    for each in clients[2:]:
        settled.add(each.update)
    settled.merge(added(clients[:2], accumulator="dense"))
    result = settled.finalize()
    for module in SHAPES:
        expected = exact(clients, module)
        assert (result.delta(module) - expected).norm() <= 1e-6 * expected.norm()


def test_merged_stacks_share_their_buffers(seed: int) -> None:
    mine, theirs = added([client("a", 4, seed=seed)]), added([client("b", 4, seed=seed)])
    mine.merge(theirs)
    assert mine._accumulator.flats["b"] is theirs._accumulator.flats["b"]


def test_a_copy_that_fails_half_way_leaves_nothing(seed: int) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(2)]
    members = added(clients)._roster.sorted()
    stack = StackAccumulator(torch.device("cpu"))
    with pytest.raises(AttributeError):
        stack.add(members, [clients[0].adapter.flat, None])  # type: ignore[list-item]
    assert stack.flats == {}


def test_unlike_aggregators_are_not_merged(seed: int) -> None:
    mine = added([client("a", 4, seed=seed)])
    before = snapshot(mine)
    for options, field in [
        ({"method": "flora"}, "method"), ({"missing": "zero"}, "missing"), ({"seed": 1}, "seed"),
        ({"dtype": "float16"}, "dtype"), ({"route": "qr"}, "route"),
    ]:
        other = added([client("b", 4, seed=seed)], **options)
        with pytest.raises(InvalidInput) as caught:
            mine.merge(other)
        assert caught.value.field == field
    with pytest.raises(InvalidInput, match="in the round already"):
        mine.merge(added([client("b", 4, seed=seed), client("a", 4, seed=seed)]))
    assert same(before, mine.state_dict())
    mine.merge(Aggregator())
    assert same(before, mine.state_dict())


# Restarts


@pytest.mark.parametrize("options", [
    {"method": "flexlora"}, {"method": "flora"}, {"accumulator": "dense"}, {"method": "zeropad"},
    {"method": "hetlora", "missing": "zero"},
], ids=str)
@pytest.mark.parametrize("through", ["memory", "torch", "safetensors"])
def test_a_restart_in_the_middle_changes_no_bit(
    seed: int, options: dict[str, str], through: str, tmp_path
) -> None:
    clients = mixed_round(seed, (torch.float32, torch.bfloat16))
    expected = bits(added(clients, **options).finalize(), clients)
    before = added(clients[:3], **options)
    state = before.state_dict()
    if through == "torch":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    if through == "safetensors":
        from safetensors import safe_open
        from safetensors.torch import save_file

        texts = {key: value for key, value in state.items() if isinstance(value, str)}
        tensors = {key: value for key, value in state.items() if key not in texts}
        save_file(tensors, tmp_path / "state.safetensors", metadata=texts)
        with safe_open(tmp_path / "state.safetensors", "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()} | file.metadata()  # noqa: SIM118
    after = Aggregator(**options)  # type: ignore[arg-type]
    after.load_state_dict(state)
    assert after.clients == before.clients
    assert after.memory == before.memory
    for each in clients[3:]:
        before.add(each.update)
        after.add(each.update)
    assert bits(after.finalize(), clients) == expected
    assert bits(before.finalize(), clients) == expected


@pytest.mark.parametrize("options", [{}, {"accumulator": "dense"}, {"method": "zeropad"}], ids=str)
def test_a_damaged_state_is_refused_whole(seed: int, options: dict[str, str]) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k, saved=True) for k in range(2)]
    aggregator = added(clients[:1], **options)
    before = snapshot(aggregator)
    good = added(clients, **options).state_dict()
    name = next(key for key, value in good.items() if isinstance(value, torch.Tensor))
    broken: list[dict[str, object]] = [
        {}, {"fastagg": "{"}, {"fastagg": "[]"}, {**good, "fastagg": good["fastagg"][:-9]},
        {**good, name: good[name][:-1]}, {**good, name: "text"},
        {key: value for key, value in good.items() if key != name},
        {**good, "fastagg": good["fastagg"].replace('"version": 2', '"version": 99')},
        {**good, "fastagg": good["fastagg"].replace("renormalise", "zero")},
        {**good, "fastagg": good["fastagg"].replace('"c1"', '"c0"')},
        {**good, "fastagg": good["fastagg"].replace('"r": 4', '"r": 5')},
    ]
    for tensor in (value for value in good.values() if isinstance(value, torch.Tensor)):
        if tensor.is_floating_point():
            broken.append({key: value * float("nan") if value is tensor else value
                           for key, value in good.items()})
    for state in broken:
        with pytest.raises(InvalidInput):
            aggregator.load_state_dict(state)
        assert same(before, aggregator.state_dict())
    with pytest.raises(InvalidInput, match="another method"):
        Aggregator("flora").load_state_dict(good)


def test_a_state_of_an_accumulator_that_the_options_exclude_is_refused(seed: int) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(2)]
    for mine, other in (("stack", "dense"), ("dense", "stack")):
        aggregator = added(clients[:1], accumulator=mine)
        before = snapshot(aggregator)
        with pytest.raises(InvalidInput, match="another accumulator") as caught:
            aggregator.load_state_dict(added(clients, accumulator=other).state_dict())
        assert (caught.value.expected, caught.value.got) == (mine, other)
        assert same(before, aggregator.state_dict())
        Aggregator().load_state_dict(before)
    state = added(clients, "zeropad").state_dict()
    for method in ("flexlora", "flora"):
        renamed = {**state, "fastagg": state["fastagg"].replace("zeropad", method)}
        with pytest.raises(InvalidInput, match="another accumulator"):
            Aggregator(method).load_state_dict(renamed)


@pytest.mark.parametrize("options", [{}, {"accumulator": "dense"}, {"method": "zeropad"}], ids=str)
def test_a_state_beyond_max_memory_is_refused(seed: int, options: dict[str, str]) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(4)]
    saved = added(clients, **options)
    aggregator = Aggregator(**options, max_memory=saved.memory - 1)  # type: ignore[arg-type]
    with pytest.raises(MemoryBudgetExceeded) as caught:
        aggregator.load_state_dict(saved.state_dict())
    assert aggregator.clients == ()
    Aggregator(**options, max_memory=caught.value.needed).load_state_dict(saved.state_dict())  # type: ignore[arg-type]


def test_a_state_describes_a_layout_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator = added([client(f"c{k}", 4, seed=seed + k) for k in range(3)])
    calls = []
    real = fastagg.rounds.state._layout_fields
    monkeypatch.setattr("fastagg.rounds.state._layout_fields",
                        lambda member: calls.append(member) or real(member))
    aggregator.state_dict()
    assert len(calls) == 1


@pytest.mark.parametrize(("method", "kind"), [("flora", "stack"), ("zeropad", "means")])
def test_a_plan_names_the_accumulator(seed: int, method: str, kind: str) -> None:
    each = client("a", 4, seed=seed)
    headers = [(each.name, each.adapter.layout, each.adapter.config)]
    assert Aggregator(method).plan_for(headers)[0] == kind


def test_the_totals_of_a_round_are_those_of_its_clients(seed: int) -> None:
    clients = mixed_round(seed)
    roster = Aggregator()._new_roster()
    for count in range(len(clients)):
        part, last = clients[: count + 1], clients[count].adapter
        ahead = roster.shapes_with([last.layout])
        sizes = roster.sizes
        roster.with_headers([(clients[count].name, last.layout, last.config)])
        assert roster.sizes is sizes
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for module, size in roster.sizes.items():
            ranks = [each.adapter.rank(module) for each in part if module in each.modules]
            assert (size.rank_sum, size.width) == (sum(ranks), max(ranks))
            found.setdefault((size.m, size.n), []).append((sum(ranks), max(ranks)))
        assert ahead == roster.shapes_with([])
        assert {
            shape: (size.count, size.rank_sum, size.width) for shape, size in ahead.items()
        } == {
            shape: (len(sums), max(r for r, _ in sums), max(w for _, w in sums))
            for shape, sums in found.items()
        }
        assert roster.nbytes == sum(each.adapter.layout.nbytes for each in part)


# Memory


def test_amounts_of_memory() -> None:
    assert parse_bytes("8GiB") == 8 << 30
    assert parse_bytes("500MB") == 500_000_000
    assert parse_bytes(" 1.5 gb ") == 1_500_000_000
    assert parse_bytes("1024") == parse_bytes(1024) == 1024
    assert parse_bytes(None) is None
    for bad in ("", "8 apples", "-1", 0, -5, 1.5, True, "GiB"):
        with pytest.raises(InvalidInput) as caught:
            parse_bytes(bad)  # type: ignore[arg-type]
        assert caught.value.field == "max_memory"


@pytest.mark.parametrize("options", [
    {"method": "flora"}, {"accumulator": "stack"}, {"accumulator": "dense"}, {},
    {"method": "zeropad"},
], ids=str)
def test_the_figure_that_a_refusal_names_is_enough(
    seed: int, options: dict[str, str], tmp_path
) -> None:
    clients = [client(f"c{k}", 16, seed=seed + k, saved=True) for k in range(6)]
    updates = [each.update for each in clients]
    with pytest.raises(MemoryBudgetExceeded) as caught:
        fastagg.aggregate(updates, max_memory=2000, **options)
    assert caught.value.budget == 2000
    assert str(caught.value.needed) in str(caught.value)
    with pytest.raises(MemoryBudgetExceeded) as again:
        fastagg.aggregate(updates, max_memory=caught.value.needed - 1, **options)
    assert again.value.needed == caught.value.needed
    result = fastagg.aggregate(updates, max_memory=caught.value.needed, **options)
    result.save(tmp_path / "out")


def test_a_refused_add_names_the_figure_and_changes_nothing(seed: int) -> None:
    clients = [client(f"c{k}", 16, seed=seed + k) for k in range(8)]
    for options in ({"accumulator": "stack"}, {"method": "flora"}):
        # Routes change with R, so that fewer clients may need more memory than more do.
        needs = [
            half._plan._needs(half._roster, [])
            for half in (added(clients[:k], **options) for k in (1, 2, 3))
        ]
        budget = max(need.stack + need.stack_work for need in needs)
        aggregator = added(clients[:3], max_memory=budget, **options)
        rest = [each.update for each in clients[3:]]
        with pytest.raises(MemoryBudgetExceeded) as caught:
            for_each(aggregator.add, rest)
        assert caught.value.needed > caught.value.budget == budget
        accepted = len(aggregator.clients)
        assert aggregator.clients == tuple(each.name for each in clients[:accepted])
        assert same(snapshot(added(clients[:accepted], **options)), aggregator.state_dict())


def test_the_stack_changes_to_dense_where_that_is_smaller(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastagg.rounds.memory_plan.WORTH_CHANGING", 0)
    dense = sum(m * n * 4 for m, n in SHAPES.values())
    aggregator, clients = Aggregator(), []
    for k in range(20):
        clients.append(client(f"c{k:02}", 8, seed=seed + k))
        aggregator.add(clients[-1].update)
        held = sum(each.adapter.nbytes for each in clients)
        assert aggregator.accumulator_kind == ("stack" if held <= dense else "dense")
        assert aggregator.memory == min(held, dense)
    result = aggregator.finalize()
    for module in SHAPES:
        expected = exact(clients, module)
        assert (result.delta(module) - expected).norm() <= 1e-6 * expected.norm()


def test_a_small_stack_is_not_worth_changing(seed: int) -> None:
    clients = [client(f"c{k:02}", 8, seed=seed + k) for k in range(20)]
    assert added(clients).accumulator_kind == "stack"


def test_memory_is_bounded_whatever_the_number_of_clients(seed: int) -> None:
    clients = [client(f"c{k:02}", 8, seed=seed + k) for k in range(30)]
    needs = added(clients[:1])
    figure = needs._plan._needs(needs._roster, [])
    budget = figure.dense + figure.dense_work + clients[0].adapter.nbytes * 3
    aggregator = Aggregator(max_memory=budget)
    for each in clients:
        aggregator.add(each.update)
        assert aggregator.memory <= budget
    assert aggregator.accumulator_kind == "dense"
    result = aggregator.finalize()
    expected = exact(clients, "model.layers.0.mlp.up")
    got = result.delta("model.layers.0.mlp.up")
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_a_round_of_folders_is_refused_before_any_number_is_read(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_folder(tmp_path / str(k), rank=8, seed=k) for k in range(4)]
    odd = make_folder(tmp_path / "odd", modules={"model.layers.0.self_attn.q_proj": (7, 16)})

    def read(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("fastagg.ops.scan", read)
    with pytest.raises(MemoryBudgetExceeded):
        fastagg.aggregate(iter(folders), max_memory="10kB")
    with pytest.raises(InvalidInput, match="another shape"):
        fastagg.aggregate([*folders, odd])
    monkeypatch.undo()
    assert fastagg.aggregate(map(str, folders)).clients == ("0", "1", "2", "3")


def test_an_iterator_of_updates_is_taken_as_it_comes(seed: int) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(3)]
    seen = []
    result = fastagg.aggregate(
        (each.update for each in clients), progress=lambda *step: seen.append(step)
    )
    assert result.clients == ("c0", "c1", "c2")
    assert seen == [(1, 0, "c0"), (2, 0, "c1"), (3, 0, "c2")]


# Options


@pytest.mark.parametrize("options", [
    {"missing": "drop"}, {"accumulator": "heap"}, {"route": "lu"}, {"device": "tpu"},
    {"dtype": "int8"}, {"dtype": torch.float64}, {"max_memory": "much"}, {"method": "sum"},
    {"seed": 2**63}, {"seed": -1}, {"seed": 1.5},
], ids=str)
def test_unknown_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput) as caught:
        Aggregator(**options)  # type: ignore[arg-type]
    assert caught.value.field == next(iter(options))


@pytest.mark.parametrize(("method", "accumulator"), [("flora", "dense"), ("zeropad", "stack"),
                                                     ("fedit", "dense")])
def test_an_accumulator_that_a_method_cannot_use(method: str, accumulator: str) -> None:
    with pytest.raises(InvalidInput, match=method):
        Aggregator(method, accumulator=accumulator)


def test_what_is_no_update_is_refused(seed: int) -> None:
    adapter = client("a", seed=seed).adapter
    with pytest.raises(InvalidInput, match="ClientUpdate"):
        Aggregator().add(adapter)  # type: ignore[arg-type]
    for single in (adapter, ClientUpdate(adapter), "folder"):
        with pytest.raises(InvalidInput, match="not a round"):
            fastagg.aggregate(single)  # type: ignore[arg-type]


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    shapes=st.lists(st.tuples(st.integers(1, 19), st.integers(1, 19)), min_size=1, max_size=3),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=1,
                    max_size=3),
    accumulator=st.sampled_from(["stack", "dense"]),
    missing=st.sampled_from(["renormalise", "zero"]),
    data=st.data(),
)
def test_any_ranks_shapes_and_dtypes(
    seed: int, ranks: list[int], shapes: list[tuple[int, int]], dtypes: list[torch.dtype],
    accumulator: str, missing: str, data: st.DataObject,
) -> None:
    modules = {f"blocks.{i}.fc": shape for i, shape in enumerate(shapes)}
    clients = []
    for k, rank in enumerate(ranks):
        have = data.draw(st.sets(st.sampled_from(list(modules)), min_size=1))
        clients.append(client(
            f"c{k}", rank, weight=1 + k, seed=seed + k, dtype=dtypes[k % len(dtypes)],
            alpha=data.draw(st.sampled_from([1.0, 0.5, 3.0, -2.0])),
            modules={name: modules[name] for name in sorted(have)},
            use_rslora=data.draw(st.booleans()),
        ))
    result = added(clients, accumulator=accumulator, missing=missing).finalize()
    for module in result.modules:
        expected = exact(clients, module, missing)
        scale = max(float(each.delta(module).norm()) for each in clients if module in each.modules)
        assert (result.delta(module) - expected).norm() <= 1e-6 * scale
    for each in clients:
        adapter = result.adapter(client=each.name)
        for module in each.modules:
            dw = exact(clients, module, missing)
            a, b = adapter.factors(module)
            got = adapter.scaling(module) * b.double() @ a.double()
            tail = torch.linalg.svdvals(dw)[each.adapter.rank(module):].norm()
            rounding = 0 if a.dtype == torch.float32 else 3 * 2.0**-8
            assert (got - dw).norm() <= tail + (3e-6 + rounding) * dw.norm() + 1e-9
