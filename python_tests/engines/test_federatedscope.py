"""FederatedScope's aggregator protocol, on feedback under PEFT's live keys."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sent_state_dicts import (
    CONFIG,
    LIVE_KEYS,
    Sent,
    bits,
    check_optimal,
    clients,
    parameters,
    state_dict,
)

from fastagg.engines.federatedscope import Aggregator
from fastagg.errors import InvalidInput


class ServerModel(torch.nn.Module):
    """Like FederatedScope's ``AdapterModel``: its state dict is that of the trained parameters."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.state = {key: tensor.clone() for key, tensor in state.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self.state

    def load_state_dict(self, state_dict: Any, strict: bool = False) -> None:  # type: ignore[override]
        for key, tensor in state_dict.items():
            self.state[key].copy_(tensor)


def course(**federate: bool) -> SimpleNamespace:
    plain = {"use_ss": False, "online_aggr": False, "ignore_weight": False}
    return SimpleNamespace(federate=SimpleNamespace(**(plain | federate)))


def info(sent: list[Sent], staleness: Any = None) -> dict[str, Any]:
    return {
        "client_feedback": [(each.weight, each.state) for each in sent],
        "recover_fun": None,
        "staleness": staleness or [(place + 1, 0) for place in range(len(sent))],
    }


def test_the_signatures_are_the_protocols() -> None:
    class Documented:
        def aggregate(self, agg_info: Any) -> None: ...
        def update(self, model_parameters: Any) -> None: ...
        def save_model(self, path: Any, cur_round: int = -1) -> None: ...
        def load_model(self, path: Any) -> None: ...

    for name in ("aggregate", "update", "save_model", "load_model"):
        assert parameters(getattr(Aggregator, name)) == parameters(getattr(Documented, name))


def test_a_round_as_the_server_runs_it() -> None:
    sent = clients([LIVE_KEYS])
    before = state_dict(8, 99, LIVE_KEYS)
    model = ServerModel(before)
    aggregator = Aggregator(CONFIG, model=model, config=course())
    feedback = info(sent)
    held = [bits(each.state) for each in sent]
    result = aggregator.aggregate(feedback)
    assert bits(model.state_dict()) == bits(before)
    # Server._perform_federated_aggregation merges the result into the model's own state dict.
    merged = {**model.state_dict(), **result}
    model.load_state_dict(merged, strict=False)
    check_optimal(model.state_dict(), sent, before)
    for place, each in enumerate(sent):
        check_optimal(aggregator.handout(place + 1), sent, each.state)
    assert held == [bits(each.state) for each in sent]


def test_clients_that_a_round_did_not_sample_are_served_too() -> None:
    """The clients that a round leaves out begin the next at their own rank all the same."""
    sent = clients([LIVE_KEYS])
    aggregator = Aggregator(CONFIG, model=ServerModel(state_dict(8, 99, LIVE_KEYS)), config=course())
    aggregator.aggregate(info(sent))
    later = clients([LIVE_KEYS], seed=50)[2:]
    aggregator.aggregate(info(later, [(3, 0), (4, 0)]))
    for place, each in enumerate(sent):
        check_optimal(aggregator.handout(place + 1), later, each.state)
    with pytest.raises(InvalidInput, match=r"client '17'.*like="):
        aggregator.handout(17)


def test_stale_updates_beside_a_newer_one_of_the_same_client() -> None:
    sent = clients([LIVE_KEYS], ranks=(2, 4, 2), weights=(5, 7, 11))
    before = state_dict(4, 99, LIVE_KEYS)
    aggregator = Aggregator(CONFIG, model=ServerModel(before), config=course())
    check_optimal(aggregator.aggregate(info(sent, [(1, 0), (2, 0), (1, 2)])), sent, before)
    assert aggregator.result is not None
    assert aggregator.result.clients == ("1", "1, stale by 2", "2")


def test_counts_are_ignored_where_the_course_says_so() -> None:
    sent = [Sent(1, each.state) for each in clients([LIVE_KEYS])]
    before = state_dict(8, 99, LIVE_KEYS)
    aggregator = Aggregator(CONFIG, model=ServerModel(before), config=course(ignore_weight=True))
    check_optimal(aggregator.aggregate(info(clients([LIVE_KEYS]))), sent, before)


@pytest.mark.parametrize("field", ["use_ss", "online_aggr"])
def test_courses_that_know_only_sums_of_factors_are_refused(field: str) -> None:
    with pytest.raises(InvalidInput, match=rf"federate.{field}"):
        Aggregator(CONFIG, model=ServerModel({}), config=course(**{field: True}))


def test_messages_of_the_distributed_mode_are_decoded() -> None:
    sent = clients([LIVE_KEYS])
    before = state_dict(8, 99, LIVE_KEYS)
    lists = info([Sent(each.weight, {k: t.tolist() for k, t in each.state.items()}) for each in sent])
    plain = Aggregator(CONFIG, model=ServerModel(before), config=course())
    with pytest.raises(InvalidInput, match=r"client '1', field 'base_model.*not a tensor.*param2tensor"):
        plain.aggregate(lists)
    decoding = Aggregator(CONFIG, model=ServerModel(before), config=course(), decode=torch.FloatTensor)
    check_optimal(decoding.aggregate(lists), sent, before)


def test_feedback_that_is_none_is_refused_and_named() -> None:
    aggregator = Aggregator(CONFIG, model=ServerModel(state_dict(8, 99, LIVE_KEYS)))
    sent = clients([LIVE_KEYS])
    broken = info(sent)
    broken["client_feedback"][2] = sent[2].state
    with pytest.raises(InvalidInput, match=r"client '3'.*client_feedback"):
        aggregator.aggregate(broken)
    with pytest.raises(InvalidInput, match=r"staleness.*expected 4, got 1"):
        aggregator.aggregate(info(sent, [(1, 0)]))
    with pytest.raises(InvalidInput, match=r"client_feedback.*nothing to aggregate"):
        aggregator.aggregate(info([]))


def test_models_are_saved_and_loaded(tmp_path: Path) -> None:
    before = state_dict(8, 99, LIVE_KEYS)
    aggregator = Aggregator(CONFIG, model=ServerModel(before), config=course())
    aggregator.save_model(str(tmp_path / "model.pt"), 3)
    aggregator.update(state_dict(8, 5, LIVE_KEYS))
    assert bits(aggregator.model.state_dict()) != bits(before)
    assert aggregator.load_model(str(tmp_path / "model.pt")) == 3
    assert bits(aggregator.model.state_dict()) == bits(before)
    with pytest.raises(ValueError, match=r"no file"):
        aggregator.load_model(str(tmp_path / "none.pt"))
