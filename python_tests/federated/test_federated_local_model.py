"""Adapters in and out of the one model: against PEFT's own files, and through the forward pass."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter, same_bits
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import PROJECTIONS, disturb, gpt2, gpt2_lora, llama, logits, lora, peft

import fastagg
from fastagg.errors import FastAggError, InvalidInput
from fastagg.federated.clients.fresh_factors import normal, ranks_of, uniform
from fastagg.federated.clients.llama import Shape, Training
from fastagg.federated.clients.local_model import LocalModel

CASES = {
    "tied llama": (llama, lora(5)),
    "untied llama": (lambda: llama(tied=False), lora(5)),
    "ranks by kind of module": (
        llama,
        lora(
            4,
            rank_pattern={"mlp.+": 7, "layers.1.self_attn.q_proj": 2},
            alpha_pattern={"mlp.+": 14},
            use_rslora=True,
            lora_dropout=0.1,
        ),
    ),
    "every linear module": (llama, lora(3, target_modules="all-linear")),
    "gpt2": (gpt2, gpt2_lora(5)),
    "embedding": (lambda: llama(tied=False), lora(4, target_modules=["embed_tokens", "q_proj"])),
    "modules_to_save": (lambda: llama(tied=False), lora(4, modules_to_save=["lm_head"])),
}

Case = tuple[Callable[[], Any], Any]


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    make, config = CASES[request.param]
    return make, copy.deepcopy(config)


def anatomy(network: torch.nn.Module) -> list[object]:
    """All of a model that an adapter could leave a trace in, but for the bits of its weights."""
    return [
        [(name, id(module), type(module), module.training) for name, module in network.named_modules()],
        [
            (name, id(weight), weight.data_ptr(), weight.requires_grad, weight.grad)
            for name, weight in network.named_parameters(remove_duplicate=False)
        ],
        [
            [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
            for module in network.modules()
        ],
        sorted(vars(network)),
        network.config.to_dict(),
    ]


def bits(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def trained(model: LocalModel, config: Any, seed: int = 0) -> fastagg.Adapter:
    with model.adapter(config, seed=seed) as network:
        disturb(network)
        return model.capture("anna")


def test_an_adapter_leaves_no_trace(case: Case) -> None:
    make, config = case
    model = LocalModel(make())
    before, weights = anatomy(model.network), bits(model.network)
    random = torch.get_rng_state()
    adapter = trained(model, config)
    with model.adapter(adapter) as network:
        network.train()
        network(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
        assert {name for name, w in network.named_parameters() if w.grad is not None} == {
            name for name, w in network.named_parameters() if w.requires_grad
        }
    assert anatomy(model.network) == before
    assert same_bits(bits(model.network), weights)
    # PEFT draws factors of its own as it puts them in place; they come from a fork of the generators.
    torch.set_rng_state(random)
    with model.adapter(config, seed=1):
        pass
    assert torch.equal(torch.get_rng_state(), random)


def test_only_the_adapter_asks_for_gradients(case: Case) -> None:
    make, config = case
    model = LocalModel(make())
    with model.adapter(config) as network:
        asking = {name for name, weight in network.named_parameters() if weight.requires_grad}
        assert asking
        assert all("lora_" in name or "modules_to_save" in name for name in asking)


def test_an_adapter_is_not_in_training_mode_until_someone_trains_it(case: Case) -> None:
    make, config = case
    model = LocalModel(make())
    for start in (config, trained(model, config)):
        with model.adapter(start) as network:
            assert not any(module.training for module in network.modules())


def test_it_leaves_no_trace_where_the_block_fails() -> None:
    model = LocalModel(llama())
    before = anatomy(model.network)
    with pytest.raises(KeyboardInterrupt), model.adapter(lora(2)):
        raise KeyboardInterrupt
    assert anatomy(model.network) == before


def test_it_leaves_no_trace_where_peft_gives_up_half_way() -> None:
    model = LocalModel(llama())
    before = anatomy(model.network)
    # The projections come first and are replaced; then PEFT meets a module it has no LoRA layer for.
    unfit = lora(2, target_modules=["q_proj", "norm"])
    with pytest.raises(InvalidInput, match="PEFT cannot put the adapter in place") as raised:
        model.adapter(unfit).__enter__()
    assert raised.value.field == "target_modules"
    assert anatomy(model.network) == before


def with_sorted_targets(adapter: fastagg.Adapter) -> dict[str, Any]:
    """PEFT writes a set of names in whatever order it has in this process."""
    raw = adapter.config.raw
    return {**raw, "target_modules": sorted(raw["target_modules"])}


def test_captured_is_what_peft_saves_and_loads(case: Case, tmp_path: Path) -> None:
    make, config = case
    model = LocalModel(make())
    with model.adapter(config) as network:
        disturb(network)
        captured = model.capture("anna")
        expected = peft.get_peft_model_state_dict(network, save_embedding_layers=False)
        here = logits(network)
        network.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    assert captured.name == "anna"
    state = captured.state_dict()
    assert same_bits(state, {key: tensor.detach().contiguous() for key, tensor in expected.items()})
    by_peft = fastagg.Adapter.load(tmp_path / "peft")
    assert with_sorted_targets(captured) == with_sorted_targets(by_peft)
    captured.save(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(make().eval(), str(tmp_path / "ours"))
    assert torch.equal(logits(loaded), here)


def test_captured_does_not_change_when_the_training_goes_on() -> None:
    model = LocalModel(llama())
    with model.adapter(lora(3)) as network:
        captured = model.capture()
        before = {key: tensor.clone() for key, tensor in captured.state_dict().items()}
        disturb(network)
        assert same_bits(captured.state_dict(), before)


def test_going_on_keeps_factors_and_configuration(case: Case, tmp_path: Path) -> None:
    make, config = case
    model = LocalModel(make())
    adapter = trained(model, config)
    adapter.save(tmp_path / "anna")
    for start in (adapter, fastagg.Adapter.load(tmp_path / "anna")):
        with model.adapter(start, seed=9):
            again = model.capture()
        assert same_bits(again.state_dict(), adapter.state_dict())
        assert again.config == adapter.config


def test_a_truncation_of_the_server_is_put_in_place() -> None:
    model = LocalModel(llama())
    update = fastagg.ClientUpdate(trained(model, lora(6)))
    handed = fastagg.aggregate([update], "flexlora").adapter(rank=2)
    with model.adapter(handed) as network:
        ours = logits(network)
    expected = copy.deepcopy(model.network).double()
    with torch.no_grad():
        for module in handed.modules:
            a, b = handed.factors(module)
            product = handed.scaling(module) * b.double() @ a.double()
            expected.get_submodule(module).weight += product
    assert torch.allclose(ours.double(), logits(expected), atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name != "embedding"])
def test_merging_is_w_plus_dw_through_the_forward_pass(name: str) -> None:
    make, config = CASES[name]
    model = LocalModel(make())
    with model.adapter(copy.deepcopy(config)) as network:
        disturb(network)
        adapter = model.capture("anna")
        with_adapter = logits(network)
    # By the equation in float64, in PEFT's own words for where each product belongs.
    exact = copy.deepcopy(model.network).double()
    probe = peft.get_peft_model(exact, copy.deepcopy(config))
    peft.set_peft_model_state_dict(probe, adapter.state_dict())
    probe.double().eval()
    expected_logits = logits(probe)
    expected = probe.merge_and_unload().state_dict()
    model.merge(adapter)
    assert torch.allclose(logits(model.network).double(), expected_logits, atol=2e-5)
    assert torch.allclose(logits(model.network), with_adapter, atol=2e-5)
    for key, weight in model.network.state_dict().items():
        error = (weight.double() - expected[key]).abs().max()
        assert error <= 2.0**-22 * expected[key].abs().max().clamp(min=1), key
    assert not any(weight.requires_grad for weight in model.network.parameters())


def test_merging_an_embedding() -> None:
    make, config = CASES["embedding"]
    model = LocalModel(make())
    adapter = trained(model, copy.deepcopy(config))
    before = bits(model.network)
    model.merge(adapter)
    a, b = adapter.factors("model.embed_tokens")
    product = adapter.scaling("model.embed_tokens") * (b.double() @ a.double()).t()
    expected = before["model.embed_tokens.weight"].double() + product
    merged = model.network.state_dict()["model.embed_tokens.weight"].double()
    assert torch.allclose(merged, expected, atol=1e-6)
    assert torch.equal(model.network.state_dict()["lm_head.weight"], before["lm_head.weight"])


def test_merging_into_half_precision_rounds_once() -> None:
    model = LocalModel(llama().to(torch.bfloat16))
    adapter = trained(model, lora(4))
    assert adapter.dtype == torch.float32  # PEFT trains in float32 whatever the base is
    before = bits(model.network)
    model.merge(adapter)
    for module in adapter.modules:
        a, b = adapter.factors(module)
        exact = before[f"{module}.weight"].double()
        exact += adapter.scaling(module) * (b.double() @ a.double())
        merged = model.network.get_submodule(module).weight
        assert merged.dtype == torch.bfloat16
        # Half an ulp of bfloat16 (8 bits), and what float32's sum may be off by.
        off = (merged.double() - exact).abs()
        assert bool((off <= exact.abs() * 2.0**-8 * 1.01 + 1e-6).all())


def test_tied_weights_stay_tied() -> None:
    for make, config in ((llama, lora(3)), (gpt2, gpt2_lora(3))):
        model = LocalModel(make())
        model.merge(trained(model, config))
        network = model.network
        assert network.get_output_embeddings().weight is network.get_input_embeddings().weight


def test_merging_into_one_of_two_tied_modules_is_refused() -> None:
    model = LocalModel(llama(tied=True))
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        adapter = trained(model, lora(3, target_modules=["q_proj", "embed_tokens"]))
    before = bits(model.network)
    with pytest.raises(InvalidInput, match="another module too") as raised:
        model.merge(adapter)
    assert raised.value.client == "anna"
    assert "lm_head" in str(raised.value)
    assert same_bits(bits(model.network), before)


def test_an_adapter_of_another_model_is_refused_and_changes_nothing() -> None:
    model = LocalModel(llama())
    before = anatomy(model.network), bits(model.network)
    foreign = make_adapter(name="ben")
    with pytest.raises(InvalidInput, match="ben"):
        model.adapter(foreign).__enter__()
    with pytest.raises(InvalidInput, match=r"model\.layers\.0\.self_attn\.q_proj"):
        model.merge(foreign)
    assert anatomy(model.network) == before[0]
    assert same_bits(bits(model.network), before[1])


def test_a_diverged_adapter_is_not_merged() -> None:
    model = LocalModel(llama())
    with model.adapter(lora(3)) as network:
        next(w for n, w in network.named_parameters() if "lora_B" in n).data[0, 0] = torch.nan
        adapter = model.capture("anna")
    before = bits(model.network)
    with pytest.raises(InvalidInput, match="NaN"):
        model.merge(adapter)
    assert same_bits(bits(model.network), before)


@pytest.mark.parametrize("initial", ["pissa", "gaussian", False])
def test_fresh_factors_are_drawn_here_alone(initial: Any) -> None:
    model = LocalModel(llama())
    before = bits(model.network)
    with pytest.raises(InvalidInput, match="init_lora_weights"):
        model.adapter(lora(3, init_lora_weights=initial)).__enter__()
    assert same_bits(bits(model.network), before)


def test_an_adapter_that_moved_base_weights_is_refused() -> None:
    model = LocalModel(llama())
    good = trained(model, lora(3))
    moved = fastagg.Adapter(good.state_dict(), {**good.config.raw, "init_lora_weights": "pissa"})
    with pytest.raises(InvalidInput, match="would change the base weights"):
        model.adapter(moved).__enter__()


def test_fresh_factors_are_shared_between_ranks_and_add_nothing() -> None:
    model = LocalModel(llama())
    bare = logits(model.network)
    found = {}
    for rank in (2, 5, 9):
        with model.adapter(lora(rank), seed=4) as network:
            assert torch.equal(logits(network), bare)
            found[rank] = model.capture()
    for module in found[9].modules:
        a = found[9].factors(module)[0]
        bound = a.shape[1] ** -0.5
        assert bool((a.abs() <= bound).all()) and float(a.abs().max()) > 0.8 * bound
        for rank, adapter in found.items():
            mine, b = adapter.factors(module)
            assert torch.equal(mine, a[:rank])
            assert not b.any()
    different = [tuple(found[9].factors(module)[0][0, :8].tolist()) for module in found[9].modules]
    assert len(set(different)) == len(different)


def test_fresh_factors_depend_on_the_seed_and_not_on_the_other_modules() -> None:
    model = LocalModel(llama())

    def fresh(seed: int, **options: Any) -> fastagg.Adapter:
        with model.adapter(lora(3, **options), seed=seed):
            return model.capture()

    module = "model.layers.0.self_attn.v_proj"
    a = fresh(1).factors(module)[0]
    assert torch.equal(fresh(1, target_modules=["v_proj"]).factors(module)[0], a)
    assert not torch.equal(fresh(2).factors(module)[0], a)


def test_a_fresh_embedding_has_b_drawn_and_a_zero() -> None:
    model = LocalModel(llama(tied=False))
    found = []
    for rank in (2, 4):
        with model.adapter(lora(rank, target_modules=["embed_tokens"]), seed=4):
            found.append(model.capture().factors("model.embed_tokens"))
    (a, b), (wider_a, wider_b) = found
    assert not a.any() and not wider_a.any()
    assert b.std() > 0.5 and torch.equal(wider_b[:, :2], b)


@given(
    rank=st.integers(1, 40),
    more=st.integers(0, 40),
    width=st.integers(1, 70),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_first_rows_do_not_depend_on_the_rank(rank: int, more: int, width: int, seed: int) -> None:
    for draw in (uniform, normal):
        few = ranks_of(rank, width, draw, torch.Generator().manual_seed(seed))
        many = ranks_of(rank + more, width, draw, torch.Generator().manual_seed(seed))
        assert few.shape == (rank, width)
        assert torch.equal(many[:rank], few)


def test_a_round_is_merged_once() -> None:
    model = LocalModel(llama())
    adapter = trained(model, lora(3))
    with pytest.raises(InvalidInput, match="earlier rounds") as raised:
        model.merge_for(3, adapter)
    assert raised.value.got == 3
    model.merge_for(2, adapter)
    once = bits(model.network)
    model.merge_for(2, adapter)
    assert same_bits(bits(model.network), once)
    assert model.round == 2
    model.merge_for(3, adapter)
    assert not same_bits(bits(model.network), once)


def test_one_adapter_at_a_time() -> None:
    model = LocalModel(llama())
    adapter = trained(model, lora(3))
    with pytest.raises(InvalidInput, match="no adapter to capture"):
        model.capture()
    with model.adapter(adapter) as network:
        inside = logits(network)
        for forbidden in (
            lambda: model.merge(adapter),
            lambda: model.adapter(adapter).__enter__(),
            model.weights,
            lambda: model.all_weights().__enter__(),
        ):
            with pytest.raises(FastAggError, match="in place"):
                forbidden()
        assert torch.equal(logits(network), inside)


def test_all_weights_train_and_come_back() -> None:
    model = LocalModel(gpt2())
    before, weights = anatomy(model.network), bits(model.network)
    with model.all_weights() as network:
        assert all(weight.requires_grad for weight in network.parameters())
        disturb(network)
        full = model.weights()
    assert anatomy(model.network) == before
    assert same_bits(bits(model.network), weights)
    assert "lm_head.weight" not in full  # tied: once, under the embedding's name
    model.set_weights(full)
    assert anatomy(model.network) == before
    assert same_bits(model.weights(), full)
    for wrong in ({}, {**full, "transformer.wte.weight": torch.zeros(3, 3)}):
        with pytest.raises(InvalidInput, match="not of this model"):
            model.set_weights(wrong)


def test_from_a_folder(tmp_path: Path) -> None:
    network = llama()
    network.save_pretrained(str(tmp_path / "base"))
    for dtype in (torch.float32, torch.bfloat16):
        model = LocalModel.from_pretrained(tmp_path / "base", dtype=dtype)
        assert model.dtype == dtype
        assert model.device.type == "cpu"
        assert not model.network.training
        own = network.to(dtype).state_dict()
        assert same_bits(bits(model.network), {key: w.clone() for key, w in own.items()})
    with model.adapter(lora(2)):
        assert model.capture().config.base_model == str(tmp_path / "base")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InvalidInput, match=re.escape(str(tmp_path / "nothing"))):
        LocalModel.from_pretrained(tmp_path / "nothing")


def test_the_embedded_model_is_drawn_from_the_seed() -> None:
    shape = Shape(hidden=16, feed_forward=24, layers=1, heads=2)
    models = [
        LocalModel.embedded(shape, Training(2, 2, 1e-2), length=16, seed=seed) for seed in (1, 1, 2)
    ]
    assert same_bits(models[0].weights(), models[1].weights())
    assert not same_bits(models[0].weights(), models[2].weights())
    drawn = LocalModel.embedded(shape, length=16, seed=1)
    assert not same_bits(models[0].weights(), drawn.weights())
    assert not any(weight.requires_grad for weight in models[0].network.parameters())
    with models[0].adapter(lora(2, target_modules=PROJECTIONS)):
        assert models[0].capture().config.base_model is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    model = LocalModel(llama(), device="cuda")
    with model.adapter(lora(4), seed=2) as network:
        disturb(network)
        adapter = model.capture()
        with_adapter = logits(network)
    assert adapter.flat.is_cpu
    model.merge(adapter)
    assert model.device.type == "cuda"
    assert torch.allclose(logits(model.network), with_adapter, atol=1e-4)
