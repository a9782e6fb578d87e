"""FedML's server aggregator, wrapped: what FedML calls by name on it, on (count, OrderedDict) pairs."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from sent_state_dicts import (
    CONFIG,
    LIVE_KEYS,
    MODULES,
    bits,
    check_optimal,
    clients,
    exact,
    parameters,
    state_dict,
)

from fastagg.engines.fedml import ServerAggregator
from fastagg.errors import InvalidInput


class Application:
    """A server aggregator as an application has it, by the methods that FedML calls."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state
        self.id = 0
        self.calls: list[str] = []

    def set_id(self, aggregator_id: int) -> None:
        self.id = aggregator_id

    def get_model_params(self) -> dict[str, torch.Tensor]:
        return self.state

    def set_model_params(self, model_parameters: dict[str, torch.Tensor]) -> None:
        self.state = model_parameters

    def on_before_aggregation(self, raw_client_model_or_grad_list: list[Any]) -> list[Any]:
        self.calls.append("before")
        return raw_client_model_or_grad_list

    def on_after_aggregation(self, aggregated_model_or_grad: dict[str, Any]) -> dict[str, Any]:
        self.calls.append("after")
        return aggregated_model_or_grad

    def aggregate(self, raw_client_model_or_grad_list: list[Any]) -> dict[str, Any]:
        raise AssertionError("the average of the factors was asked for")


def round_of(aggregator: Any, models: list[tuple[float, Any]]) -> dict[str, torch.Tensor]:
    """What ``FedMLAggregator.aggregate`` does with its aggregator."""
    model_list = aggregator.on_before_aggregation(models)
    averaged = aggregator.on_after_aggregation(aggregator.aggregate(model_list))
    aggregator.set_model_params(averaged)
    return averaged  # type: ignore[no-any-return]


def test_the_signature_is_the_hooks() -> None:
    def aggregate(self: Any, raw_client_model_or_grad_list: Any) -> Any: ...

    assert parameters(ServerAggregator.aggregate) == parameters(aggregate)


def test_a_round_through_the_methods_that_fedml_calls() -> None:
    sent = clients(weights=(120, 30, 75, 11))
    before = state_dict(8, 99)
    application = Application(before)
    aggregator = ServerAggregator(application, CONFIG, "flexlora", seed=3)
    aggregator.set_id(7)
    models = [(float(each.weight), OrderedDict(each.state)) for each in sent]
    held = [bits(state) for _, state in models]
    returned = round_of(aggregator, models)
    check_optimal(returned, sent, before)
    assert application.calls == ["before", "after"]
    assert application.id == 7
    assert application.state is returned
    assert held == [bits(state) for _, state in models]
    for index, each in enumerate(sent):
        check_optimal(aggregator.handout(index), sent, each.state)


def test_weights_of_every_kind_of_number() -> None:
    counts = (np.int64(120), 30, np.float32(75.0), 11.0)
    sent = clients(weights=[float(count) for count in counts])
    aggregator = ServerAggregator(Application(state_dict(8, 99)), CONFIG)
    models = [(count, each.state) for count, each in zip(counts, sent, strict=True)]
    check_optimal(aggregator.aggregate(models), sent, state_dict(8, 99))  # type: ignore[arg-type]


def test_a_whole_models_state_dict_gives_up_its_adapter() -> None:
    """``DefaultServerAggregator`` loads ``model.state_dict()`` back strictly: every key returns."""

    def whole(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        frozen = {
            f"base_model.model.{module}.base_layer.weight": torch.ones(m, n)
            for module, (m, n) in MODULES.items()
        }
        return {"base_model.model.model.norm.weight": torch.ones(24), **frozen, **adapter}

    sent = clients([LIVE_KEYS])
    adapter = state_dict(8, 99, LIVE_KEYS)
    before = whole(adapter)
    aggregator = ServerAggregator(Application(before), CONFIG)
    returned = aggregator.aggregate([(each.weight, whole(each.state)) for each in sent])
    assert list(returned) == list(before)
    check_optimal({key: returned[key] for key in adapter}, sent, adapter)
    assert all(returned[key] is before[key] for key in before if ".lora_" not in key)


def test_what_else_fedml_may_pass_is_refused_and_named() -> None:
    before = state_dict(8, 99)
    aggregator = ServerAggregator(Application(before), CONFIG)
    good = [(each.weight, each.state) for each in clients()]
    with pytest.raises(InvalidInput, match=r"client '1'.*number of examples, state dict.*FedAvg"):
        aggregator.aggregate([good[0], (30, good[1][1], good[1][1])])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match=r"client '1'.*weight"):
        aggregator.aggregate([good[0], (-1, good[1][1])])
    with pytest.raises(InvalidInput, match=r"client '1'.*not a state dict"):
        aggregator.aggregate([good[0], (30, None)])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match=r"raw_client_model_or_grad_list.*nothing to aggregate"):
        aggregator.aggregate([])
    assert aggregator.result is None
    with pytest.raises(InvalidInput, match=r"first round"):
        aggregator.handout(0)
    with pytest.raises(AttributeError):
        _ = aggregator.no_such_method


def test_it_survives_pickling() -> None:
    aggregator = pickle.loads(pickle.dumps(ServerAggregator(Application(state_dict(8, 99)), CONFIG)))
    sent = clients()
    aggregator.aggregate([(each.weight, each.state) for each in sent])
    module = next(iter(MODULES))
    torch.testing.assert_close(
        aggregator.result.delta(module).double(), exact(sent, module), rtol=1e-5, atol=1e-6
    )
