"""The strategy over a grid of nodes in this process, against the equations in float64."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import MODULES, make_adapter, same_bits
from node_grid import (
    EXAMPLES,
    RANKS,
    NodeGrid,
    Trainer,
    assert_best,
    delta,
    exact,
    grid_of,
    merged,
    trainers,
)

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict  # isort: skip
from fastagg.engines.flower import FastAggStrategy, decode
from fastagg.errors import InvalidInput, MemoryBudgetExceeded


def strategy(method: str = "flexlora", **options: Any) -> FastAggStrategy:
    return FastAggStrategy(method, **{"initial": make_adapter(rank=8)} | options)


def assert_all_best(clients: dict[str, Trainer], round: int, room: float = 2e-6) -> None:
    """What arrived in the round after is the best approximation of what was sent in the round."""
    for client in clients.values():
        for module in MODULES:
            dw = exact(clients.values(), round, module)
            assert_best(client.got[round + 1].adapter, dw, module, client.rank, room)


@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("says", ["rank", "config"])
def test_every_node_gets_the_best_approximation_at_its_rank(
    dtype: torch.dtype, room: float, says: str
) -> None:
    clients = trainers(dtype=dtype, says=says)
    run = strategy(initial=make_adapter(rank=8, dtype=dtype))
    result = run.start(grid_of(clients.values()), num_rounds=3)
    for client in clients.values():
        assert client.kinds == ["query", *["train", "evaluate"] * 3]
        first = client.got[1].adapter
        assert {first.rank(module) for module in MODULES} == {client.rank}
        assert client.got[1].rank == client.rank
        assert all(not t.any() for key, t in first.state_dict().items() if "lora_B" in key)
        assert {t.dtype for t in client.got[3].adapter.state_dict().values()} == {dtype}
    for number in (1, 2):
        assert_all_best(clients, number, room)
        for client in clients.values():
            handed = client.evaluated[number].adapter.state_dict()
            assert same_bits(handed, client.got[number + 1].adapter.state_dict())
    assert not run.failures
    # The one record of the result is the adapter of the largest rank, dan's.
    assert same_bits(decode(result.arrays), clients["dan"].evaluated[3].adapter.state_dict())
    loss = sum(EXAMPLES[name] * rank for name, rank in RANKS.items()) / sum(EXAMPLES.values())
    for number in (1, 2, 3):
        metrics = result.train_metrics_clientapp[number]
        assert metrics["loss"] == pytest.approx(loss)
        assert (metrics["fastagg-participants"], metrics["fastagg-failures"]) == (4, 0)
        assert result.evaluate_metrics_clientapp[number]["accuracy"] == pytest.approx(loss / 16)


@pytest.mark.parametrize("keyed_by", ["node id", "name"])
def test_ranks_that_the_server_decides_on(keyed_by: str) -> None:
    clients = trainers(says="name")
    grid = grid_of(clients.values())
    if keyed_by == "name":
        ranks: dict[Any, int] = RANKS
    else:
        ranks = {node: client.rank for node, client in grid.nodes.items()}
    run = strategy(ranks=ranks)
    run.start(grid, num_rounds=2)
    assert_all_best(clients, 1)
    asked = ["query"] if keyed_by == "name" else []
    assert all(client.kinds == [*asked, *["train", "evaluate"] * 2] for client in clients.values())
    assert sorted(run.exchange.clients) == (
        sorted(RANKS) if keyed_by == "name" else sorted(map(str, grid.nodes))
    )


def test_ranks_are_taken_from_the_replies_where_nobody_is_asked() -> None:
    clients = trainers()
    run = FastAggStrategy("flexlora", ranks="reply")
    run.start(grid_of(clients.values()), num_rounds=2)
    for client in clients.values():
        assert client.kinds == ["train", "evaluate"] * 2
        assert client.got[1].adapter is None and client.got[1].rank is None
    assert_all_best(clients, 1)


def test_a_client_app_without_a_query_gets_the_initial_adapters_rank() -> None:
    clients = trainers(says="nothing")
    for client in clients.values():
        client.rank = 8
    grid = grid_of(clients.values())
    run = strategy()
    run.start(grid, num_rounds=2)
    assert_all_best(clients, 1)
    assert run.exchange.clients == tuple(map(str, grid.nodes))


def broken(name: str) -> tuple[RecordDict | None, str]:
    """The content of a reply that cannot be taken, and what is said of it."""
    trained = make_adapter(rank=4).state_dict()
    arrays = ArrayRecord({key: Array(t.numpy()) for key, t in trained.items()})
    counted = MetricRecord({"num-examples": 3})
    key = next(iter(trained))
    if name == "not finite":
        arrays[key] = Array((trained[key] * float("nan")).numpy())
        return RecordDict({"a": arrays, "m": counted}), "NaN or infinite"
    if name == "another rank":
        arrays[key] = Array(trained[key][:3].numpy())
        return RecordDict({"a": arrays, "m": counted}), "rank"
    if name == "no arrays":
        return RecordDict({"m": counted}), "one ArrayRecord"
    if name == "two records":
        return RecordDict({"a": arrays, "b": ArrayRecord(), "m": counted}), "one ArrayRecord"
    if name == "no weight":
        return RecordDict({"a": arrays, "m": MetricRecord({"loss": 1.0})}), "num-examples"
    if name == "a negative weight":
        return RecordDict({"a": arrays, "m": MetricRecord({"num-examples": -1})}), "not a weight"
    if name == "cut off":
        arrays[key] = Array("float32", (4, 16), "numpy.ndarray", arrays[key].data[:-1])
        return RecordDict({"a": arrays, "m": counted}), "bytes instead of"
    if name == "pickled":
        arrays[key] = Array("float32", (4, 16), "pickle", b"\x80\x04.")
        return RecordDict({"a": arrays, "m": counted}), "serialised as 'pickle'"
    if name == "no JSON":
        fields = ConfigRecord({"adapter-config": "{"})
        return RecordDict({"a": arrays, "m": counted, "fastagg": fields}), "adapter-config"
    assert name == "error"
    return None, "out of memory"


@pytest.mark.parametrize(
    "name",
    [
        "not finite",
        "another rank",
        "no arrays",
        "two records",
        "no weight",
        "a negative weight",
        "cut off",
        "pickled",
        "no JSON",
        "error",
    ],
)
def test_a_reply_that_cannot_be_taken_is_reported_and_left_out(name: str) -> None:
    clients = trainers()
    grid = grid_of(clients.values())
    content, said = broken(name)

    def altered(node: int, reply: Message) -> Message:
        if grid.nodes[node] is not clients["ben"] or 1 not in clients["ben"].sent:
            return reply
        if 2 in clients["ben"].sent or reply.metadata.message_type != "train":
            return reply
        if content is None:
            failed = Message(Error(7, "out of memory"), reply_to=reply)
            failed.metadata.__dict__.update(reply.metadata.__dict__)
            return failed
        reply.content = content
        return reply

    grid.altered = altered
    run = strategy()
    result = run.start(grid, num_rounds=2)
    (failure,) = run.failures
    assert (failure.client, failure.round) == ("ben", 1) and said in failure.reason
    metrics = result.train_metrics_clientapp
    assert [metrics[n]["fastagg-failures"] for n in (1, 2)] == [1, 0]
    assert [metrics[n]["fastagg-participants"] for n in (1, 2)] == [3, 4]
    assert run.outcome is not None and run.outcome.participants == tuple(sorted(RANKS))
    # It counts for nothing, and gets the others' average all the same.
    clients["ben"].sent.pop(1)
    assert_all_best(clients, 1)


def test_nodes_that_do_not_answer_in_time_are_left_out() -> None:
    clients = trainers()
    grid = grid_of(clients.values())
    dead = next(iter(grid.nodes))
    run = strategy(query_timeout=0.1)
    grid.delay[dead] = None
    started = time.monotonic()
    run.start(grid, num_rounds=1, timeout=0.3)
    assert time.monotonic() - started < 30
    assert [failure.reason for failure in run.failures] == ["has not answered who it is"] * 2
    # It is heard again, and asked again.
    grid.delay[dead] = 0
    run.start(grid, num_rounds=2, timeout=30)
    grid.delay[dead] = None
    run.start(grid, num_rounds=3, timeout=0.3)
    assert [(f.client, f.round, f.reason) for f in run.failures[2:]] == [
        (clients["ann"].name, 3, "has not answered")
    ] * 2
    assert clients["ann"].kinds == ["query", "train", "evaluate"]
    for module in MODULES:
        assert_best(clients["ann"].got[2].adapter, exact(clients.values(), 1, module), module, 2)


def test_a_reply_is_dropped_before_the_next_one_is_asked_for() -> None:
    grid = grid_of(trainers().values())
    strategy().start(grid, num_rounds=2)
    # 4 answers to queries, and 4 of training and 4 of evaluation a round; none waits for the collector.
    assert len(grid.alive) == 20 and max(grid.alive) == 0


def test_replies_are_folded_in_as_they_arrive() -> None:
    grid = grid_of(trainers().values())
    run = strategy(fraction_evaluate=0.0)
    folded = []
    receive = run.exchange.receive

    def noting(client: str, *rest: Any) -> Any:
        folded.append((client, len(grid.order)))
        return receive(client, *rest)

    run.exchange.receive = noting  # type: ignore[method-assign]
    slow = 11
    grid.delay[slow] = 3
    run.start(grid, num_rounds=1)
    # Four answers to queries came before. Each was folded in before a later one was pulled, and the
    # three quick ones while the slow one was due.
    assert [pulled for _, pulled in folded] == [5, 6, 7, 8]
    assert folded[-1][0] == grid.nodes[slow].name == "ann"


def test_a_run_that_was_ended_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    def play(folder: Path, cut: bool) -> dict[str, Trainer]:
        clients = trainers()
        run = strategy(folder=folder)
        if cut:
            run.start(grid_of(clients.values()), num_rounds=2)
            run = strategy(folder=folder, resume=True)
            # The node ids of another run are others, and in another order.
            again = grid_of(reversed(clients.values()), first=900)
            result = run.start(again, num_rounds=4)
            assert sorted(result.train_metrics_clientapp) == [3, 4]
        else:
            result = run.start(grid_of(clients.values()), num_rounds=4)
        assert same_bits(decode(result.arrays), run.exchange.adapter("dan").state_dict())
        return clients

    whole, cut = play(tmp_path / "whole", False), play(tmp_path / "cut", True)
    assert cut["ann"].kinds.count("query") == 2
    for name in RANKS:
        for number in range(1, 5):
            one, other = whole[name].got[number].adapter, cut[name].got[number].adapter
            assert same_bits(one.state_dict(), other.state_dict())
    with pytest.raises(InvalidInput, match="resume=True"):
        strategy(folder=tmp_path / "cut")


def test_a_finished_run_that_is_resumed_has_its_result_and_asks_nobody(tmp_path: Path) -> None:
    clients = trainers()
    strategy(folder=tmp_path).start(grid_of(clients.values()), num_rounds=1)
    grid = grid_of(clients.values())
    run = strategy(folder=tmp_path, resume=True)
    result = run.start(grid, num_rounds=1)
    assert not grid.order and not result.train_metrics_clientapp
    assert same_bits(decode(result.arrays), run.exchange.adapter("dan").state_dict())


def test_flora_hands_every_stack_out_once_to_whoever_merges() -> None:
    clients = trainers()
    grid = grid_of(clients.values())
    absent = next(iter(grid.nodes))
    grid.delay[absent] = 0
    run = strategy("flora")
    result = run.start(grid, num_rounds=2)
    # ann hears nothing of round 3, and everything of it in round 4.
    grid.delay[absent] = None
    run.start(grid, num_rounds=3, timeout=0.2)
    grid.delay[absent] = 0
    result = run.start(grid, num_rounds=4)
    assert 3 not in clients["ann"].got
    for client in clients.values():
        received = client.got[4]
        assert [number for number, _ in received.merges] == [1, 2, 3]
        assert received.rank == client.rank
        weights = merged(received)
        for module in MODULES:
            total = sum(exact(clients.values(), number, module) for number in (1, 2, 3))
            assert (weights[module] - total).norm() <= 2e-6 * total.norm()
    stack = decode(result.arrays)
    for module in MODULES:
        (a,) = (t for key, t in stack.items() if key.endswith(f"{module}.lora_A.weight"))
        (b,) = (t for key, t in stack.items() if key.endswith(f"{module}.lora_B.weight"))
        dw = exact(clients.values(), 4, module)
        assert (b.double() @ a.double() - dw).norm() <= 1e-6 * dw.norm()


def test_flora_sends_a_client_whose_state_is_lost_all_stacks_again(tmp_path: Path) -> None:
    clients = trainers()
    strategy("flora", folder=tmp_path).start(grid_of(clients.values()), num_rounds=2)
    # Another run: the contexts of the first are gone.
    run = strategy("flora", folder=tmp_path, resume=True)
    run.start(grid_of(clients.values(), first=70), num_rounds=3)
    assert not run.failures
    for client in clients.values():
        assert [number for number, _ in client.got[3].merges] == [1, 2]
        assert [number for number, _ in client.evaluated[3].merges] == [1, 2, 3]


def test_two_nodes_of_one_name_are_not_both_let_in() -> None:
    clients = trainers()
    grid = grid_of([*clients.values(), Trainer("ann", 4)])
    run = strategy(fraction_evaluate=0.0)
    run.start(grid, num_rounds=1)
    (failure,) = run.failures
    assert failure.client == "ann (15)" and "has the name" in failure.reason
    # Where the first is gone, the client has come back as the other.
    del grid.connected[11]
    run.start(grid, num_rounds=2)
    assert len(run.failures) == 1 and run.outcome is not None
    assert run.outcome.participants == tuple(sorted(RANKS))


def test_nodes_that_were_not_sampled_are_brought_up_to_date_too() -> None:
    clients = trainers()
    run = strategy(fraction_train=0.5, min_train_nodes=2, fraction_evaluate=1.0)
    run.start(grid_of(clients.values()), num_rounds=3)
    for number in (1, 2, 3):
        assert sum(number in client.sent for client in clients.values()) == 2
        for client in clients.values():
            for module in MODULES:
                dw = exact(clients.values(), number, module)
                assert_best(client.evaluated[number].adapter, dw, module, client.rank)


def test_a_round_with_too_few_answers_is_repeated() -> None:
    clients = trainers()
    grid = grid_of(clients.values())

    def altered(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "train" and grid.order.count(node) == 2:
            reply.content = RecordDict()
        return reply

    grid.altered = altered
    run = strategy(min_clients=3, fraction_evaluate=0.0)
    result = run.start(grid, num_rounds=2)
    assert len(run.failures) == 4
    assert result.train_metrics_clientapp[1]["fastagg-participants"] == 0
    assert [client.kinds for client in clients.values()] == [["query", "train", "train"]] * 4
    assert run.exchange.round == 2 and set(clients["ann"].got) == {1}


def test_evaluation_counts_failures_and_weighs_by_examples() -> None:
    clients = trainers()
    grid = grid_of(clients.values())

    def altered(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "evaluate" and node == 12:
            reply.content = RecordDict({"m": MetricRecord({"accuracy": 1.0})})
        return reply

    grid.altered = altered
    run = strategy()
    result = run.start(grid, num_rounds=1)
    (failure,) = run.failures
    assert failure.client == "ben" and "num-examples" in failure.reason
    left = {name: rank for name, rank in RANKS.items() if name != "ben"}
    mean = sum(EXAMPLES[name] * rank / 16 for name, rank in left.items())
    mean /= sum(EXAMPLES[name] for name in left)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(mean)


def test_the_servers_own_evaluation_sees_the_rounds_of_the_whole_run(tmp_path: Path) -> None:
    clients, seen = trainers(), []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append((number, len(arrays)))
        return MetricRecord({"accuracy": 0.5})

    strategy(folder=tmp_path).start(grid_of(clients.values()), num_rounds=1, evaluate_fn=evaluate)
    run = strategy(folder=tmp_path, resume=True)
    result = run.start(grid_of(clients.values()), num_rounds=2, evaluate_fn=evaluate)
    assert seen == [(0, 8), (1, 8), (1, 8), (2, 8)]
    assert sorted(result.evaluate_metrics_serverapp) == [1, 2]


def test_the_aggregators_options_are_passed_through() -> None:
    clients = trainers()
    run = strategy("hetlora", accumulator="auto", missing="zero", seed=3, dtype="float32", route="auto")
    run.start(grid_of(clients.values()), num_rounds=1)
    assert run.outcome is not None and run.outcome.aggregate is not None
    assert run.outcome.aggregate.method.name == "hetlora"
    assert run.outcome.aggregate.report.missing == "zero"
    tight = strategy(max_memory=1000)
    with pytest.raises(MemoryBudgetExceeded, match="max_memory"):
        tight.start(grid_of(trainers().values()), num_rounds=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "fedavg"}, "fedavg"),
        ({"ranks": "asked"}, "asked"),
        ({"ranks": {"ann": 2}, "initial": None}, "initial"),
        ({"missing": "maybe"}, "missing"),
        ({"min_clients": 0}, "min_clients"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        strategy(**options)


def test_there_is_no_global_model_to_begin_with() -> None:
    arrays = ArrayRecord({"w": Array(torch.zeros(2).numpy())})
    with pytest.raises(InvalidInput, match="initial="):
        strategy().start(NodeGrid({}), arrays)


def test_deltas_of_the_reference_are_the_clients_own() -> None:
    """The yardstick itself: dW of one client alone is its own s B A."""
    (client, *_) = trainers().values()
    run = strategy(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    run.start(grid_of([client]), num_rounds=2)
    for module in MODULES:
        own = delta(client.sent[1], module, client.rank)
        assert torch.equal(exact([client], 1, module), own)
        assert_best(client.got[2].adapter, own, module, client.rank)
