"""A round by each integration, from what its codebase passes to what it sends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.engine_work import HandedOut, Round, StateDict, Work
from fastagg.engines import fate_llm, federatedscope, fedml, openfedllm

__all__ = ["ENGINES"]


class _Encoded(Mapping[str, Tensor]):
    """A Flower record as it is sent; whoever compares it decodes it."""

    def __init__(self, record: Any) -> None:
        self._record = record

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        from fastagg.engines.flower import decode

        return decode(self._record)

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def flower_round(work: Work) -> Round:
    """``FastAggStrategy.aggregate_train``, from messages as they come from the wire, then each node's
    record."""
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fastagg.engines.flower import FastAggStrategy, encode
    from fastagg.engines.flower.fields import FASTAGG, config_text

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    nodes = range(len(work.states))
    asked = [Message(RecordDict(), node, "train") for node in nodes]
    replies = []
    for node in nodes:
        content = RecordDict(
            {
                "arrays": encode(work.states[node]),
                "metrics": MetricRecord({"num-examples": work.weights[node]}),
                FASTAGG: ConfigRecord({"adapter-config": config_text(work.config(work.ranks[node]))}),
            }
        )
        replies.append(Message(content, reply_to=asked[node]))
    strategy = FastAggStrategy("flexlora", ranks="reply", device="cpu")

    def run() -> list[StateDict]:
        strategy._training = {node: str(node) for node in nodes}
        strategy.exchange.begin(strategy._training.values())
        strategy.aggregate_train(1, iter(replies))
        outgoing = {node: strategy.exchange.outgoing(str(node)) for node in nodes}
        sent = strategy._messages(asked, outgoing, 2)
        return [_Encoded(message.content["arrays"]) for message in sent]

    return run


def nvflare_aggregator_round(work: Work) -> Round:
    """``FastAggModelAggregator``: ``accept_model`` for each client, then ``aggregate_model``."""
    from fastagg.engines.nvflare import FastAggModelAggregator

    aggregator = FastAggModelAggregator(work.config(work.middle), device="cpu")
    models = _flmodels(work)

    def run() -> list[StateDict]:
        aggregator.reset_stats()
        for model in models:
            aggregator.accept_model(model)
        return [aggregator.aggregate_model().params]

    return run


def nvflare_controller_round(work: Work) -> Round:
    """What ``FastAggController`` does with answers, and each client's next model."""
    from fastagg.engines.exchange import Exchange
    from fastagg.engines.nvflare.models import config_in, model_of, tensors_in, weight_in

    exchange, models = Exchange("flexlora", device="cpu"), _flmodels(work)
    names = [model.meta["client_name"] for model in models]

    def run() -> list[StateDict]:
        exchange.begin(names)
        for name, model in zip(names, models, strict=True):
            weight = weight_in(model, "NUM_STEPS_CURRENT_ROUND", name)
            assert weight is not None
            exchange.receive(name, tensors_in(model, name), weight, config_in(model))
        exchange.finish()
        return [model_of(exchange.outgoing(name).adapter).params for name in names]

    return run


def _flmodels(work: Work) -> list[Any]:
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

    from fastagg.engines.nvflare.models import CONFIG

    return [
        FLModel(
            params_type=ParamsType.FULL,
            params=state,
            meta={
                "client_name": str(place),
                "NUM_STEPS_CURRENT_ROUND": weight,
                CONFIG: work.config(rank),
            },
        )
        for place, (state, weight, rank) in enumerate(
            zip(work.states, work.weights, work.ranks, strict=True)
        )
    ]


def openfedllm_round(work: Work) -> Round:
    """``global_aggregate``, then each client's hand-out."""
    hook = openfedllm.GlobalAggregate(work.config(8))
    clients = range(len(work.states))

    def run() -> list[StateDict]:
        arguments = SimpleNamespace(fed_alg="fedavg")
        model, _ = hook(arguments, work.model, work.states, work.weights, clients, 0)
        return [model, *(hook.handout(client) for client in clients)]

    return run


def fedml_round(work: Work) -> Round:
    """``ServerAggregator.aggregate``, then each client's hand-out."""
    application = SimpleNamespace(get_model_params=lambda: work.model)
    aggregator = fedml.ServerAggregator(application, work.config(8))
    pairs = list(zip(work.weights, work.states, strict=True))

    def run() -> list[StateDict]:
        model = aggregator.aggregate(pairs)
        return [model, *(aggregator.handout(place) for place in range(len(pairs)))]

    return run


def federatedscope_round(work: Work) -> Round:
    """``Aggregator.aggregate``, then each client's hand-out."""
    model = SimpleNamespace(state_dict=lambda: work.model)
    aggregator = federatedscope.Aggregator(work.config(8), model=model)
    clients = range(len(work.states))
    feedback = list(zip(work.weights, work.states, strict=True))
    info = {"client_feedback": feedback, "staleness": [(client, 0) for client in clients]}

    def run() -> list[StateDict]:
        return [aggregator.aggregate(info), *(aggregator.handout(client) for client in clients)]

    return run


class _Party(dict[str, Any]):
    """A party's messages: what FATE's ``ctx.parties[rank]`` gets and puts."""

    def put(self, name: str, value: Any) -> None:
        self[name] = value


def fate_llm_round(work: Work) -> Round:
    """``model_aggregation``, which replies to every party; the arrays are float64 as FATE sends them."""
    names = list(work.model)
    server = fate_llm.AggregatorServer(names, work.config(8))
    messages = [
        ([_as_fate_sends(state[name]) for name in names], weight)
        for state, weight in zip(work.states, work.weights, strict=True)
    ]
    context = SimpleNamespace(
        guest=SimpleNamespace(rank=0),
        hosts=SimpleNamespace(ranks=range(1, len(messages))),
        parties=[_Party({"fedavg_model_mixed_client_values": message}) for message in messages],
    )

    def run() -> list[StateDict]:
        server.model_aggregation(context)
        replies = (party["fedavg_model_aggregated_values"] for party in context.parties)
        return [dict(zip(names, map(torch.from_numpy, reply), strict=True)) for reply in replies]

    return run


def _as_fate_sends(tensor: Tensor) -> NDArray[Any]:
    return (tensor if tensor.dtype == torch.float16 else tensor.double()).numpy()


@dataclass(frozen=True)
class Engine:
    """An integration.

    Attributes:
        integration: makes its round of some work.
        handed_out: what its codebase is handed.
        sent_as: the dtype that its codebase makes of the clients' tensors; None: it leaves them.
    """

    integration: Callable[[Work], Round]
    handed_out: HandedOut
    sent_as: torch.dtype | None = None


MODEL, CLIENTS, BOTH = HandedOut(True, False), HandedOut(False, True), HandedOut(True, True)

ENGINES = {
    "Flower": Engine(flower_round, CLIENTS),
    "NVFlare, FedAvg": Engine(nvflare_aggregator_round, MODEL),
    "NVFlare, controller": Engine(nvflare_controller_round, CLIENTS),
    "OpenFedLLM": Engine(openfedllm_round, BOTH),
    "FedML": Engine(fedml_round, BOTH),
    "FederatedScope": Engine(federatedscope_round, BOTH),
    "FATE-LLM": Engine(fate_llm_round, CLIENTS, sent_as=torch.float64),
}
