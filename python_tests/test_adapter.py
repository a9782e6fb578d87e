"""Adapters against PEFT itself: its files, its scaling, its delta weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import MODULES, Tiny, make_adapter, make_config, make_state_dict, same_bits

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput
from fastagg.peft_format.config import AdapterConfig

TARGETS = ["embed", "blocks.0", "blocks.1", "conv1", "conv2", "conv3"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"blocks.*": 2, "conv2": 5},
        "alpha_pattern": {"^blocks.1": 3, "embed": 40},
    },
    "patterns and rslora": {
        "rank_pattern": {"0": 2, "conv.": 3},
        "alpha_pattern": {".*1": 7},
        "use_rslora": True,
    },
}


def peft_model(seed: int = 0, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=options.pop("target_modules", TARGETS),
        init_lora_weights=False,
        **options,
    )
    return peft.get_peft_model(Tiny(), config)


def layers(model: Any) -> dict[str, Any]:
    import peft

    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_scaling_and_delta_weights_are_pefts(name: str, tmp_path: Path) -> None:
    model = peft_model(**OPTIONS[name])
    model.save_pretrained(tmp_path / "client")
    adapter = Adapter.load(tmp_path / "client")
    expected = layers(model.double())
    assert set(adapter.modules) == set(expected) == set(TARGETS)
    for module, layer in expected.items():
        assert adapter.rank(module) == layer.r["default"]
        assert adapter.scaling(module) == layer.scaling["default"]
        delta = adapter.delta(module)
        truth = layer.get_delta_weight("default")
        assert delta.dtype == torch.float32
        assert delta.shape == layer.get_base_layer().weight.shape == truth.shape
        assert (delta - truth).norm() <= 1e-6 * truth.norm()


def test_fan_in_fan_out_is_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"c_attn": pytorch_utils.Conv1D(9, 5)})
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "client")
    delta = Adapter.load(tmp_path / "client").delta("c_attn")
    truth = layers(model.double())["c_attn"].get_delta_weight("default")
    assert delta.shape == truth.shape == (5, 9)
    assert (delta - truth).norm() <= 1e-6 * truth.norm()


def test_a_live_models_tensors_are_the_saved_ones(tmp_path: Path) -> None:
    model = peft_model(modules_to_save=["head"])
    model.save_pretrained(tmp_path / "client")
    saved = Adapter.load(tmp_path / "client")
    live = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if "lora_" in key or ".modules_to_save." in key
    }
    adapter = Adapter(live, model.peft_config["default"], name="live")
    assert adapter.state_dict().keys() == live.keys()
    assert adapter.modules == saved.modules
    for module in saved.modules:
        assert torch.equal(adapter.delta(module), saved.delta(module))
    adapter.save(tmp_path / "again")
    assert same_bits(Adapter.load(tmp_path / "again").state_dict(), saved.state_dict())
    with pytest.raises(InvalidInput, match="get_peft_model_state_dict"):
        Adapter(model.state_dict(), model.peft_config["default"])


def test_pefts_own_state_dict_is_taken_as_it_is() -> None:
    peft = pytest.importorskip("peft")
    model = peft_model(modules_to_save=["head"])
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = Adapter(state, model.peft_config["default"])
    assert same_bits(adapter.state_dict(), {key: value.detach() for key, value in state.items()})
    assert [span.key for span in adapter.layout.whole] == [
        "base_model.model.head.bias",
        "base_model.model.head.weight",
    ]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_travel_as_whole_tensors(bias: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft_model(bias=bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.fill_(3)
    model.save_pretrained(tmp_path / "client")
    adapter = Adapter.load(tmp_path / "client")
    named = {span.parameter for span in adapter.layout.whole}
    own = {name for name, _ in Tiny().named_parameters() if name.endswith(".bias")}
    assert named == (own if bias == "all" else own - {"head.bias"})
    adapter.save(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "again").state_dict()
    assert all((loaded[span.key] == 3).all() for span in adapter.layout.whole)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_peft_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft_model(modules_to_save=["head"], **OPTIONS[name])
    model.save_pretrained(tmp_path / "client")
    adapter = Adapter.load(tmp_path / "client")
    adapter.save(tmp_path / "saved")
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "saved")
    tokens = torch.arange(11)
    model.eval()
    assert torch.equal(model(tokens), loaded(tokens))
    assert not torch.equal(Tiny()(tokens), loaded(tokens))


def test_factors_and_state_dict_are_views() -> None:
    adapter = make_adapter(rank_pattern={"v_proj": 3})
    state = adapter.state_dict()
    for module, (m, n) in MODULES.items():
        a, b = adapter.factors(module)
        assert a.shape == (adapter.rank(module), n)
        assert b.shape == (m, adapter.rank(module))
        assert torch.equal(a, state[f"base_model.model.{module}.lora_A.weight"])
        assert torch.equal(b, state[f"base_model.model.{module}.lora_B.weight"])
        begin, end = adapter.flat.data_ptr(), adapter.flat.data_ptr() + adapter.flat.numel()
        assert begin <= a.data_ptr() < end
        assert begin <= state[f"base_model.model.{module}.lora_B.weight"].data_ptr() < end


def test_the_state_dict_is_copied_in() -> None:
    state = make_state_dict()
    adapter = Adapter(state, make_config())
    before = {key: value.clone() for key, value in state.items()}
    for value in state.values():
        value.fill_(5)
    assert same_bits(adapter.state_dict(), before)


def test_strided_and_trained_tensors_are_taken() -> None:
    state = make_state_dict()
    strided = {key: value.t().contiguous().t().requires_grad_() for key, value in state.items()}
    assert same_bits(Adapter(strided, make_config()).state_dict(), state)


@pytest.mark.parametrize(
    "value", [np.ones((8, 16)), [1.0], None, torch.empty(8, 16, device="meta"), torch.eye(8).to_sparse()]
)
def test_what_is_no_tensor_with_data_is_refused(value: Any) -> None:
    state: dict[str, Any] = make_state_dict()
    key = next(iter(state))
    state[key] = value
    with pytest.raises(InvalidInput) as caught:
        Adapter(state, make_config(), name="c7")
    assert (caught.value.field, caught.value.client) == (key, "c7")


def test_a_list_is_no_state_dict() -> None:
    with pytest.raises(InvalidInput, match="not a state dict"):
        Adapter([torch.ones(2)], make_config())  # type: ignore[arg-type]


def test_the_config_may_come_in_three_forms() -> None:
    peft = pytest.importorskip("peft")
    state = make_state_dict()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    fields = {**config.to_dict(), "target_modules": sorted(config.target_modules)}
    one = Adapter(state, config)
    assert one.config == Adapter(state, fields).config
    assert one.config == Adapter(state, AdapterConfig.from_dict(fields)).config
    assert one.layout is Adapter(state, fields).layout


def test_an_unknown_module_is_named() -> None:
    adapter = make_adapter(name="c7")
    for call in (adapter.rank, adapter.scaling, adapter.factors, adapter.delta):
        with pytest.raises(InvalidInput, match="no such module") as caught:
            call("model.layers.9")
        assert (caught.value.client, caught.value.module) == ("c7", "model.layers.9")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_counted(bad: float, dtype: torch.dtype) -> None:
    state = make_state_dict(dtype=dtype)
    module = "model.layers.1.self_attn.q_proj"
    state[f"base_model.model.{module}.lora_B.weight"][3:5, 2] = bad
    with pytest.raises(InvalidInput, match="2 of 192 values are NaN or infinite") as caught:
        Adapter(state, make_config(), name="c7").check_finite()
    assert (caught.value.client, caught.value.module) == ("c7", module)
    assert caught.value.field == f"base_model.model.{module}.lora_B.weight"
    state[f"base_model.model.{module}.lora_A.weight"][0, 0] = bad
    with pytest.raises(InvalidInput, match="1 more tensor"):
        Adapter(state, make_config()).check_finite(client="other")


def test_whole_tensors_are_checked_too() -> None:
    extra = {"base_model.model.score.weight": torch.tensor([[1.0, math.nan]])}
    with pytest.raises(InvalidInput) as caught:
        make_adapter(extra_tensors=extra).check_finite()
    assert caught.value.field == "base_model.model.score.weight"
    make_adapter().check_finite()


def test_factors_whose_product_leaves_float32_are_refused(tmp_path: Path) -> None:
    """Finite, each of them: but one such client would make the sum of all clients infinite."""
    state = make_state_dict(rank=2)
    large = {key: tensor * 1e30 for key, tensor in state.items()}
    with pytest.raises(InvalidInput, match=r"anna.*q_proj.*range of float32"):
        Adapter(large, make_config(rank=2), name="anna").check_finite()
    gauged = {key: tensor * (1e30 if "lora_A" in key else 1e-30) for key, tensor in state.items()}
    Adapter(gauged, make_config(rank=2), name="ben").check_finite()


def test_tensors_are_cast_as_they_are_copied() -> None:
    state = {key: tensor.double() / 3 for key, tensor in make_state_dict().items()}
    adapter = Adapter(state, make_config(), dtype=torch.float32)
    assert {tensor.dtype for tensor in adapter.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor, state[key].float()) for key, tensor in adapter.state_dict().items())
    with pytest.raises(InvalidInput, match="float64"):
        Adapter(state, make_config())
