"""What all hooks on state dicts share: ranks, keys, dtypes, what is left out, and PEFT's own models."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft_rounds
import pytest
import torch
from adapters import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from sent_state_dicts import (
    CONFIG,
    LIVE_KEYS,
    MODULES,
    PEFT_KEYS,
    Sent,
    check_optimal,
    clients,
    factors,
    state_dict,
)
from torch import Tensor

from fastagg.engines.openfedllm import GlobalAggregate
from fastagg.engines.state_dicts import StateDictRounds, adapter_part
from fastagg.errors import InvalidInput
from fastagg.peft_format.config import AdapterConfig

peft = pytest.importorskip("peft")

KEYS = (
    PEFT_KEYS,
    LIVE_KEYS,
    ("model.base_model.model.", ""),
    ("module.base_model.model.", ".default"),
    ("base_model.model._orig_mod.", ".client_7"),
)


def run(rounds: GlobalAggregate, sent: list[Sent], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    states, counts = [each.state for each in sent], [each.weight for each in sent]
    returned, _ = rounds(None, before, states, counts, range(len(sent)), 0)
    return returned


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_ranks_weights_and_keys(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    ranks = data.draw(st.lists(st.integers(1, 18), min_size=count, max_size=count))
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    keys = data.draw(st.lists(st.sampled_from(KEYS), min_size=count, max_size=count))
    sent = clients(keys, ranks, weights, seed=data.draw(st.integers(0, 99)))
    before = state_dict(data.draw(st.integers(1, 18)), 7, data.draw(st.sampled_from(KEYS)))
    rounds = GlobalAggregate(CONFIG)
    check_optimal(run(rounds, sent, before), sent, before)
    for place, each in enumerate(sent):
        check_optimal(rounds.handout(place), sent, each.state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_comes_in_half_precision_goes_back_in_it(dtype: torch.dtype) -> None:
    sent = clients(dtype=dtype)
    before = state_dict(8, 99, dtype=dtype)
    rounds = GlobalAggregate(CONFIG)
    check_optimal(run(rounds, sent, before), sent, before, tolerance=1e-2)
    for place, each in enumerate(sent):
        check_optimal(rounds.handout(place), sent, each.state, tolerance=1e-2)


@pytest.mark.parametrize("form", ["fields", "LoraConfig", "folder", "AdapterConfig"])
def test_scalings_follow_the_clients_own_ranks(form: str, tmp_path: Path) -> None:
    """alpha_pattern and rsLoRA too, whatever rank the shared configuration names."""
    fields = make_config(MODULES, rank=64, alpha=16, alpha_pattern={"up_proj": 5.0}, use_rslora=True)
    config: Any = fields
    if form == "LoraConfig":
        config = peft.LoraConfig(
            r=64, lora_alpha=16, alpha_pattern={"up_proj": 5.0}, use_rslora=True,
            target_modules=["q_proj", "up_proj"],
        )  # fmt: skip
    elif form == "folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        config = tmp_path
    elif form == "AdapterConfig":
        config = AdapterConfig.from_dict(fields)
    sent = clients()
    rounds = GlobalAggregate(config)
    run(rounds, sent, state_dict(8, 99))
    assert rounds.result is not None
    for module in MODULES:
        alpha = 5.0 if "up_proj" in module else 16.0
        dw = torch.zeros(MODULES[module], dtype=torch.float64)
        for each in sent:
            a, b = factors(each.state, module)
            dw += each.weight / sum(other.weight for other in sent) * alpha / math.sqrt(len(a)) * b @ a
        torch.testing.assert_close(rounds.result.delta(module).double(), dw, rtol=1e-5, atol=1e-6)


def test_ranks_may_differ_from_module_to_module() -> None:
    up = {name: size for name, size in MODULES.items() if "up_proj" in name}
    attention = {name: size for name, size in MODULES.items() if "up_proj" not in name}
    mixed = [
        Sent(3, {**state_dict(2, 1, modules=up), **state_dict(6, 2, modules=attention)}),
        Sent(5, {**state_dict(9, 3, modules=up), **state_dict(1, 4, modules=attention)}),
    ]
    rounds = GlobalAggregate(make_config(MODULES, rank=8, alpha=16, rank_pattern={"up_proj": 4}))
    before = state_dict(8, 99)
    check_optimal(run(rounds, mixed, before), mixed, before)
    for place, each in enumerate(mixed):
        rank_of = {module: len(factors(each.state, module)[0]) for module in MODULES}
        assert len(set(rank_of.values())) == 2
        check_optimal(rounds.handout(place), mixed, each.state)


def test_a_client_with_nan_fails_the_round_or_is_left_out_by_name() -> None:
    sent = clients()
    next(iter(sent[2].state.values()))[0, 0] = math.nan
    before = state_dict(8, 99)
    strict = GlobalAggregate(CONFIG)
    run(strict, clients(seed=7), before)
    kept = strict.result
    with pytest.raises(InvalidInput, match=r"client '2'.*q_proj.*NaN"):
        run(strict, sent, before)
    assert strict.result is kept
    lenient = GlobalAggregate(CONFIG, skip_invalid=True)
    with pytest.warns(UserWarning, match=r"left out of the round: client '2'.*NaN"):
        returned = run(lenient, sent, before)
    counted = [sent[0], sent[1], sent[3]]
    check_optimal(returned, counted, before)
    check_optimal(lenient.handout(2), counted, sent[2].state)
    assert lenient.result is not None
    assert [left.client for left in lenient.result.report.skipped] == ["2"]
    states, none_valid = [each.state for each in sent], r"1 that are not valid.*NaN"
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InvalidInput, match=none_valid):
        lenient(None, before, states, [1] * 4, [2], 0)


def test_a_module_that_only_some_have_needs_the_clients_own_numbers() -> None:
    few = dict(list(MODULES.items())[:2])
    every = state_dict(4, 5)
    rounds = GlobalAggregate(CONFIG)
    rounds(None, every, [every, state_dict(2, 6, modules=few)], [1, 1], [0, 1], 0)
    rounds(None, every, [every, state_dict(2, 6, modules=few)], [1, 1], [1], 1)
    with pytest.raises(InvalidInput, match=r"client '0', field '.*layers.1.*like="):
        rounds.handout(0)
    handed = rounds.handout(0, like=every)
    own = [key for key in every if "layers.1" in key]
    assert own
    assert all(torch.equal(handed[key], every[key]) for key in own)


def test_modules_to_save_are_averaged_beside_the_factors() -> None:
    key = "base_model.model.score.weight"
    sent = clients()
    for place, each in enumerate(sent):
        each.state[key] = torch.full((3, 5), float(place))
    before = {**state_dict(8, 99), key: torch.zeros(3, 5)}
    returned = run(GlobalAggregate({**CONFIG, "modules_to_save": ["score"]}), sent, before)
    total = sum(each.weight for each in sent)
    mean = sum(place * each.weight for place, each in enumerate(sent)) / total
    torch.testing.assert_close(returned[key], torch.full((3, 5), mean))


def test_bases_that_depend_on_the_rank_do_not_mix() -> None:
    rounds = GlobalAggregate({**CONFIG, "init_lora_weights": "pissa"})
    with pytest.raises(InvalidInput, match=r"client '0'.*derives the base weights from the rank"):
        run(rounds, clients(), state_dict(8, 99))


# PEFT's own models.


def trained(rank: int, seed: int, **options: Any) -> Any:
    """A tiny Llama with an adapter whose B is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base = peft_rounds.llama()
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, peft_rounds.lora(rank, lora_alpha=16, **options))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.1)
    return model


def deltas(model: Any) -> dict[str, Tensor]:
    return peft_rounds.peft_parts(copy.deepcopy(model).double())[0]


def get_saved(model: Any) -> dict[str, Tensor]:
    return dict(peft.get_peft_model_state_dict(model, save_embedding_layers=False))


def get_live(model: Any) -> dict[str, Tensor]:
    asks = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name in asks}


def get_whole(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("get", [get_saved, get_live, get_whole])
def test_peft_loads_what_comes_back(get: Any) -> None:
    """Whichever way the codebase takes an adapter out of a model, and puts it in again."""
    models, weights = [trained(rank, rank) for rank in (2, 4, 8, 16)], [3, 1, 2, 5]
    sent = [deltas(model) for model in models]
    exact = {
        module: sum(weight / 11 * each[module] for weight, each in zip(weights, sent, strict=True))
        for module in sent[0]
    }
    server = trained(8, 77)
    frozen = {name: tensor.clone() for name, tensor in server.state_dict().items() if "lora" not in name}
    rounds = GlobalAggregate(peft_rounds.lora(8, lora_alpha=16))
    returned, _ = rounds(None, get(server), [get(model) for model in models], weights, range(4), 0)

    def load(model: Any, state: dict[str, Tensor]) -> None:
        if get is get_saved:
            peft.set_peft_model_state_dict(model, state)
        else:
            model.load_state_dict(state, strict=get is get_whole)

    load(server, returned)
    for place, model in enumerate(models):
        # A whole model's hand-out is its adapter alone.
        state = rounds.handout(place)
        model.load_state_dict(state, strict=False) if get is get_whole else load(model, state)
    for model, rank in zip([server, *models], (8, 2, 4, 8, 16), strict=True):
        loaded = deltas(model)
        for module, dw in exact.items():
            values = torch.linalg.svdvals(dw)
            error = float((loaded[module] - dw).norm())
            assert error <= float(values[rank:].norm()) + 1e-5 * float(dw.norm())
    after = server.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_of_a_whole_model_only_what_peft_trains_counts() -> None:
    model = trained(4, 1, bias="lora_only", modules_to_save=["lm_head"])
    whole = model.state_dict()
    kept = adapter_part(whole, AdapterConfig.of(model.peft_config["default"]))
    asks = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert kept.keys() == asks
    saved = get_saved(model)
    assert adapter_part(saved, AdapterConfig.of(model.peft_config["default"])) is saved


def test_of_a_whole_model_all_biases_count_where_all_are_trained() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft_rounds.lora(4, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
        model = peft.get_peft_model(peft_rounds.gpt2(), config)
    asks = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(name.endswith("ln_1.bias") for name in asks)
    assert adapter_part(model.state_dict(), AdapterConfig.of(config)).keys() == asks


def test_the_methods_that_hand_out_ranks() -> None:
    sent = clients(ranks=(4, 4, 4, 4))
    before = state_dict(4, 99)
    for method in ("fedit", "zeropad", "hetlora"):
        returned = run(GlobalAggregate(CONFIG, method), sent, before)
        assert {key: tensor.shape for key, tensor in returned.items()} == {
            key: tensor.shape for key, tensor in before.items()
        }
    with pytest.raises(InvalidInput, match=r"method"):
        StateDictRounds(CONFIG, "flora")
    with pytest.raises(InvalidInput, match=r"client '3'"):
        StateDictRounds(CONFIG, clients={3: {**CONFIG, "use_dora": True}})
