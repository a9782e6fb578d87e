"""The strategy of the older API: Flower's own Server and NumPyClients, with the network left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from adapters import MODULES, make_adapter, make_config, make_state_dict, same_bits

pytest.importorskip("flwr")

from flwr.client import NumPyClient
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status
from flwr.server import Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from node_grid import ALPHA, EXAMPLES, RANKS, Trainer, assert_best, exact, merged

from fastagg.engines.flower import FastAggFedAvg, Received, fit_result, receive_arrays
from fastagg.engines.flower.codec import from_npy
from fastagg.engines.flower.legacy_client import properties
from fastagg.errors import InvalidInput


@dataclass(eq=False)
class Participant(NumPyClient, Trainer):
    """A client of the older API whose training is a draw of numbers."""

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        return properties(client=self.name, rank=self.rank)

    def fit(self, parameters: Any, config: dict[str, Any]) -> tuple[Any, int, dict[str, Any]]:
        received = receive_arrays(parameters, config)
        self.got[received.round] = received
        seed = 100 * received.round + self.rank
        state = self.sent[received.round] = make_state_dict(rank=self.rank, dtype=self.dtype, seed=seed)
        config = make_config(rank=self.rank)
        return fit_result(state, config, EXAMPLES[self.name], {"loss": float(self.rank)})

    def evaluate(self, parameters: Any, config: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
        received = receive_arrays(parameters, config)
        self.evaluated[received.round] = received
        return self.rank / 16, EXAMPLES[self.name], {"accuracy": 1.0}


class Plain(Participant):
    """One that knows nothing of FastAgg: it sends back as many arrays as came, in their order."""

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def fit(self, parameters: Any, config: dict[str, Any]) -> tuple[Any, int, dict[str, Any]]:
        received = receive_arrays(parameters, config)
        self.got[received.round] = received
        trained = [array + 1 for array in parameters]
        state = zip(received.adapter.state_dict(), trained, strict=True)
        self.sent[received.round] = {key: torch.from_numpy(array) for key, array in state}
        return trained, EXAMPLES[self.name], {}


@dataclass
class Proxy(ClientProxy):
    """Calls a client in this process."""

    client: Any
    altered: Callable[[int, Any], Any] = field(default=lambda number, result: result)
    fits: int = 0

    def __init__(self, cid: str, client: Any) -> None:
        ClientProxy.__init__(self, cid)
        self.client, self.fits = client, 0
        self.altered = lambda number, result: result

    def __hash__(self) -> int:
        return hash(self.cid)

    def get_properties(self, ins: Any, timeout: Any, group_id: Any) -> Any:
        return self.client.to_client().get_properties(ins)

    def get_parameters(self, ins: Any, timeout: Any, group_id: Any) -> Any:
        raise AssertionError("the strategy has the first parameters")

    def fit(self, ins: Any, timeout: Any, group_id: Any) -> FitRes:
        self.fits += 1
        return self.altered(self.fits, self.client.to_client().fit(ins))  # type: ignore[no-any-return]

    def evaluate(self, ins: Any, timeout: Any, group_id: Any) -> EvaluateRes:
        return self.client.to_client().evaluate(ins)  # type: ignore[no-any-return]

    def reconnect(self, ins: Any, timeout: Any, group_id: Any) -> Any:
        raise AssertionError("nobody reconnects")


def served(clients: list[Any], strategy: FastAggFedAvg) -> tuple[Server, dict[str, Proxy]]:
    manager = SimpleClientManager()
    proxies = {str(place): Proxy(str(place), client) for place, client in enumerate(clients, start=40)}
    for proxy in proxies.values():
        manager.register(proxy)
    server = Server(client_manager=manager, strategy=strategy)
    # One after the other: the clients keep what they got in plain dictionaries.
    server.set_max_workers(1)
    return server, {proxy.client.name: proxy for proxy in proxies.values()}


def participants(kind: Any = Participant, **options: Any) -> dict[str, Any]:
    return {name: kind(name, rank, **options) for name, rank in RANKS.items()}


def strategy(method: str = "flexlora", **options: Any) -> FastAggFedAvg:
    given = {"initial": make_adapter(rank=8), "min_fit_clients": 4, "min_evaluate_clients": 4}
    return FastAggFedAvg(method, **given | {"min_available_clients": 4} | options)


@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_every_client_gets_the_best_approximation_at_its_rank(dtype: torch.dtype, room: float) -> None:
    clients = participants(dtype=dtype)
    run = strategy(initial=make_adapter(rank=8, dtype=dtype))
    server, _ = served(list(clients.values()), run)
    history, _ = server.fit(num_rounds=3, timeout=None)
    for number in (1, 2):
        for client in clients.values():
            for module in MODULES:
                dw = exact(clients.values(), number, module)
                assert_best(client.got[number + 1].adapter, dw, module, client.rank, room)
            handed = client.evaluated[number].adapter.state_dict()
            assert same_bits(handed, client.got[number + 1].adapter.state_dict())
            assert client.got[number].rank == client.rank
    loss = sum(EXAMPLES[name] * rank for name, rank in RANKS.items()) / sum(EXAMPLES.values())
    assert dict(history.metrics_distributed_fit["loss"]) == pytest.approx(dict.fromkeys((1, 2, 3), loss))
    assert dict(history.losses_distributed) == pytest.approx(dict.fromkeys((1, 2, 3), loss / 16))
    assert [n for _, n in history.metrics_distributed_fit["fastagg-participants"]] == [4, 4, 4]
    dan = clients["dan"].evaluated[3].adapter.state_dict()
    found = [
        from_npy(data, str(tensor.dtype).removeprefix("torch."))
        for data, tensor in zip(server.parameters.tensors, dan.values(), strict=True)
    ]
    assert same_bits(dict(zip(dan, found, strict=True)), dan)


def test_a_client_that_knows_nothing_of_fastagg_answers_in_order() -> None:
    clients = participants(Plain)
    ranks = {str(place): rank for place, rank in enumerate(RANKS.values(), start=40)}
    run = strategy(ranks=ranks)
    server, _ = served(list(clients.values()), run)
    server.fit(num_rounds=2, timeout=None)
    assert not run.failures
    for client in clients.values():
        for module in MODULES:
            dw = exact(clients.values(), 1, module)
            assert_best(client.got[2].adapter, dw, module, client.rank)


def changed(**options: Any) -> Callable[[int, FitRes], FitRes]:
    """Changes a client's first answer."""

    def altered(number: int, result: FitRes) -> FitRes:
        if number == 1:
            for name, value in options.items():
                setattr(result, name, value)
        return result

    return altered


def raising(number: int, result: FitRes) -> FitRes:
    if number == 1:
        raise ConnectionError("gone")
    return result


@pytest.mark.parametrize(
    ("altered", "said"),
    [
        (changed(parameters=Parameters([], "numpy.ndarray")), "tensors"),
        (changed(parameters=Parameters([b"junk"] * 8, "numpy.ndarray")), "npy"),
        (changed(metrics={"fastagg": "{"}), "JSON object"),
        (changed(metrics={"fastagg": '{"tensors": [["w", 1, 2]]}'}), "tensors"),
        (changed(num_examples=-1), "not a weight"),
        (changed(status=Status(Code.FIT_NOT_IMPLEMENTED, "cannot train")), "cannot train"),
        (raising, "has not answered"),
    ],
)
def test_an_answer_that_cannot_be_taken_is_reported_and_left_out(altered: Any, said: str) -> None:
    clients = participants()
    run = strategy()
    server, proxies = served(list(clients.values()), run)
    proxies["ben"].altered = altered
    history, _ = server.fit(num_rounds=2, timeout=None)
    (failure,) = run.failures
    assert (failure.client, failure.round) == ("ben", 1) and said in failure.reason
    assert [n for _, n in history.metrics_distributed_fit["fastagg-failures"]] == [1, 0]
    del clients["ben"].sent[1]
    for client in clients.values():
        for module in MODULES:
            assert_best(
                client.got[2].adapter, exact(clients.values(), 1, module), module, client.rank
            )


def test_flora_sends_the_stacks_that_a_client_has_not_merged() -> None:
    clients = participants()
    server, _ = served(list(clients.values()), strategy("flora"))
    server.fit(num_rounds=3, timeout=None)
    for client in clients.values():
        stacks = [stack for number in (1, 2, 3) for stack in client.got[number].merges]
        assert [number for number, _ in stacks] == [1, 2]
        weights = merged(Received(3, None, None, tuple(stacks)))
        for module in MODULES:
            total = sum(exact(clients.values(), number, module) for number in (1, 2))
            assert (weights[module] - total).norm() <= 2e-6 * total.norm()


def test_a_run_that_was_ended_goes_on_under_other_cids(tmp_path: Any) -> None:
    clients = participants()
    server, _ = served(list(clients.values()), strategy(folder=tmp_path))
    server.fit(num_rounds=1, timeout=None)
    run = strategy(folder=tmp_path, resume=True)
    server, _ = served(list(reversed(clients.values())), run)
    server.fit(num_rounds=1, timeout=None)
    assert run.exchange.round == 3 and run.exchange.clients == tuple(sorted(RANKS))
    for client in clients.values():
        for module in MODULES:
            assert_best(
                client.got[2].adapter, exact(clients.values(), 1, module), module, client.rank
            )


def test_a_config_of_another_strategy_is_refused() -> None:
    with pytest.raises(InvalidInput, match="FastAggFedAvg"):
        receive_arrays([], {"lr": 0.1})


def test_the_scaling_of_the_reference_is_the_configurations() -> None:
    assert make_config(rank=4)["lora_alpha"] == ALPHA
