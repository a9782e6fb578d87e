"""The client's side with real PEFT models, and the two sides together without NVFlare between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("nvflare")
pytest.importorskip("peft")

from federated.tiny_models import disturb, llama, lora
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.fuel.utils import fobs
from peft import get_peft_model, get_peft_model_state_dict

from fastagg import Adapter, ClientUpdate, InvalidInput, aggregate
from fastagg.engines.exchange import Exchange
from fastagg.engines.nvflare import AdapterClient, FastAggModelAggregator
from fastagg.engines.nvflare.models import config_in, config_of, merges_in, model_of, tensors_in

RANKS = {"site-1": 2, "site-2": 8}
WEIGHTS = {"site-1": 3, "site-2": 5}


def peft_llama(rank: int, **options: Any) -> Any:
    return get_peft_model(llama(tied=False), lora(rank, **options))


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """module -> scaling B A of the adapter in the model, float64, by the layers themselves."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and "default" in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            found[name] = layer.scaling["default"] * b.detach().double() @ a.detach().double()
    return found


def bases(model: Any) -> dict[str, torch.Tensor]:
    return {name: layer.get_base_layer().weight.detach().double() for name, layer in layers(model)}


def layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A")]


def wire(model: FLModel) -> FLModel:
    """As it is after NVFlare's serialisation."""
    return fobs.loads(fobs.dumps(model))


def test_a_client_takes_the_best_of_its_own_rank_from_a_global_adapter() -> None:
    """With alpha = 2 r for the clients and another for the server, scalings differ as well."""
    sites = {name: peft_llama(rank) for name, rank in RANKS.items()}
    clients = {name: AdapterClient(model) for name, model in sites.items()}
    aggregator = FastAggModelAggregator(lora(12, lora_alpha=7))
    total = {}
    for number, (name, model) in enumerate(sites.items()):
        disturb(model, seed=number)
        answer = wire(clients[name].answer(WEIGHTS[name]))
        answer.meta["client_name"] = name
        aggregator.accept_model(answer)
        for module, delta in deltas(model).items():
            total[module] = total.get(module, 0) + WEIGHTS[name] / 8 * delta
    handed = wire(aggregator.aggregate_model())
    handed.current_round = 1
    for name, model in sites.items():
        clients[name].take(handed)
        for module, delta in deltas(model).items():
            best = torch.linalg.svdvals(total[module])[RANKS[name] :].norm()
            assert (delta - total[module]).norm() <= best + 3e-6 * total[module].norm()


def test_a_client_of_a_larger_rank_than_the_global_adapter_can_train_all_of_it() -> None:
    site = peft_llama(8)
    client = AdapterClient(site)
    narrow = peft_llama(2)
    disturb(narrow)
    config = config_of(narrow.peft_config["default"])
    state = get_peft_model_state_dict(narrow, save_embedding_layers=False)
    handed = model_of(Adapter(state, config))
    handed.current_round = 1
    client.take(wire(handed))
    expected = deltas(narrow)
    for module, delta in deltas(site).items():
        assert torch.allclose(delta, expected[module], atol=1e-6)
    for _, layer in layers(site):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert bool(((a != 0).any(1) | (b != 0).any(0)).all())


def test_an_initial_model_without_a_configuration_is_taken_as_the_clients_own() -> None:
    """A recipe's first global model is a state dict, and nothing says its scaling."""
    first, site = peft_llama(8, lora_alpha=16), peft_llama(4, lora_alpha=16)
    disturb(first)
    prefixed = {f"model.{key}": value for key, value in get_peft_model_state_dict(first).items()}
    client = AdapterClient(site)
    client.take(FLModel(params_type="FULL", params=prefixed, current_round=0))
    for (_, one), (_, other) in zip(layers(first), layers(site), strict=True):
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        assert torch.equal(a, one.lora_A["default"].weight[:4])
        # alpha / 8 became alpha / 4.
        assert torch.allclose(2 * b, one.lora_B["default"].weight[:, :4])
    assert client.answer(1).params.keys() == prefixed.keys()


def test_stacks_are_merged_once_each_in_their_order_and_factors_begin_afresh() -> None:
    sites = {name: peft_llama(rank) for name, rank in RANKS.items()}
    clients = {name: AdapterClient(model) for name, model in sites.items()}
    exchange = Exchange("flora")
    expected = bases(sites["site-1"])
    for number in range(3):
        for name, model in sites.items():
            out = exchange.outgoing(name)
            # The first site sleeps through the second round.
            if not (number == 1 and name == "site-1"):
                received = model_of(out.adapter, out.merges)
                received.current_round = number
                clients[name].take(wire(received))
                clients[name].take(wire(received))
                for module, weight in bases(model).items():
                    assert torch.allclose(weight, expected[module], atol=1e-5)
                if number:
                    assert all(not bool(delta.any()) for delta in deltas(model).values())
                disturb(model, seed=number)
        taking_part = [name for name in sites if not (number == 1 and name == "site-1")]
        exchange.begin(taking_part)
        share = sum(WEIGHTS[name] for name in taking_part)
        for name in taking_part:
            answer = wire(clients[name].answer(WEIGHTS[name]))
            assert exchange.receive(name, tensors_in(answer), WEIGHTS[name], config_in(answer)) is None
            for module, delta in deltas(sites[name]).items():
                expected[module] = expected[module] + WEIGHTS[name] / share * delta
        assert exchange.finish().aggregate is not None


def test_a_client_that_lacks_earlier_stacks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import nvflare.client as flare

    monkeypatch.setattr(flare, "get_site_name", lambda: "site-1")
    site = peft_llama(2)
    disturb(site)
    answer = AdapterClient(site).answer(1)
    update = ClientUpdate(Adapter(answer.params, config_in(answer)), client_id="site-1")
    stack = aggregate([update], "flora").stacked()
    before = bases(site)
    with pytest.raises(InvalidInput, match=r"site-1.*expected 1, got 2"):
        AdapterClient(site).take(model_of(None, ((2, stack),)))
    assert all(torch.equal(before[module], weight) for module, weight in bases(site).items())


def test_tensors_that_the_model_has_no_place_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import nvflare.client as flare

    monkeypatch.setattr(flare, "get_site_name", lambda: "site-1")
    other = AdapterClient(peft_llama(2, target_modules=["k_proj"])).answer(1)
    with pytest.raises(InvalidInput, match="target_modules"):
        AdapterClient(peft_llama(2, target_modules=["q_proj"])).take(other)


def test_stacks_cross_the_wire_under_their_rounds(seed: int) -> None:
    from adapters import make_adapter

    stacks = tuple((number, make_adapter(rank=3, seed=seed + number)) for number in (2, 11, 3))
    found = merges_in(wire(model_of(make_adapter(rank=2, seed=seed), stacks)))
    assert [number for number, _ in found] == [2, 3, 11]
    for number, stack in found:
        assert torch.equal(stack.flat, dict(stacks)[number].flat)
