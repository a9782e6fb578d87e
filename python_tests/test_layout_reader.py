"""What the keys and shapes of an adapter say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters import MODULES, make_adapter, make_config, make_state_dict

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput

Q = "model.layers.0.self_attn.q_proj"


KEY = f"base_model.model.{Q}"


def refusal(state: dict[str, torch.Tensor], **fields: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        Adapter(state, make_config(config_extra=fields), name="c7")
    assert caught.value.client == "c7"
    assert "c7" in str(caught.value)
    assert caught.value.cure
    return caught.value


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The usual state dict with tensors of the first module replaced, added or taken out."""
    state = make_state_dict()
    for suffix, tensor in changes.items():
        key = f"{KEY}.{suffix.replace('__', '.')}"
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    return state


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.",
        "model.base_model.model.",
        "module.base_model.model.",
        "_orig_mod.base_model.model.",
        "a.b.c.base_model.model.",
        "",
    ],
)
def test_what_stands_before_the_module_is_dropped(prefix: str) -> None:
    adapter = make_adapter(prefix=prefix)
    assert adapter.modules == tuple(sorted(MODULES))
    assert f"{prefix}{Q}.lora_A.weight" in adapter.state_dict()
    assert adapter.layout.by_module[Q].a.key == f"{KEY}.lora_A.weight"


def test_wrappers_of_training_frameworks_are_dropped() -> None:
    state = {
        key.replace("layers.0", "layers._fsdp_wrapped_module.0._checkpoint_wrapped_module"): tensor
        for key, tensor in make_state_dict().items()
    }
    assert Adapter(state, make_config()).modules == tuple(sorted(MODULES))


@pytest.mark.parametrize("adapter", ["default", "client-3", "weight"])
def test_an_adapters_name_within_the_keys(adapter: str) -> None:
    state = {
        key.replace(".weight", f".{adapter}.weight"): tensor for key, tensor in make_state_dict().items()
    }
    state[f"base_model.model.embed.lora_embedding_A.{adapter}"] = torch.ones(8, 30)
    state[f"base_model.model.embed.lora_embedding_B.{adapter}"] = torch.ones(5, 8)
    state[f"base_model.model.score.modules_to_save.{adapter}.weight"] = torch.ones(2, 5)
    layout = Adapter(state, make_config()).layout
    assert [slot.module for slot in layout.slots] == sorted([*MODULES, "embed"])
    assert layout.by_module["embed"].a.key == "base_model.model.embed.lora_embedding_A"
    assert [span.key for span in layout.whole] == ["base_model.model.score.weight"]


def test_two_adapters_in_one_state_dict_are_refused() -> None:
    state = {
        key.replace(".weight", f".{name}.weight"): tensor
        for key, tensor in make_state_dict().items()
        for name in ("default", "other")
    }
    assert "two adapters" in refusal(state).problem


def test_two_tensors_for_one_factor_are_refused() -> None:
    state = make_state_dict()
    state[f"model.{KEY}.lora_A.weight"] = state[f"{KEY}.lora_A.weight"]
    error = refusal(state)
    assert error.module == Q
    assert "two tensors for one factor" in error.problem


def test_embeddings_and_convolutions() -> None:
    state = {
        "base_model.model.embed.lora_embedding_A": torch.ones(8, 30),
        "base_model.model.embed.lora_embedding_B": torch.ones(5, 8),
        "base_model.model.c1.lora_A.weight": torch.ones(8, 3, 7),
        "base_model.model.c1.lora_B.weight": torch.ones(4, 8, 1),
        "base_model.model.c2.lora_A.weight": torch.ones(8, 3, 3, 2),
        "base_model.model.c2.lora_B.weight": torch.ones(4, 8, 1, 1),
        "base_model.model.c3.lora_A.weight": torch.ones(8, 3, 1, 2, 3),
        "base_model.model.c3.lora_B.weight": torch.ones(4, 8, 1, 1, 1),
    }
    layout = Adapter(state, make_config()).layout
    found = {
        slot.module: (slot.kind, slot.m, slot.n, slot.weight_shape, slot.transposed)
        for slot in layout.slots
    }
    assert found == {
        "c1": ("conv1d", 4, 21, (4, 3, 7), False),
        "c2": ("conv2d", 4, 18, (4, 3, 3, 2), False),
        "c3": ("conv3d", 4, 18, (4, 3, 1, 2, 3), False),
        "embed": ("embedding", 5, 30, (30, 5), True),
    }


def test_fan_in_fan_out_transposes_the_weight() -> None:
    slot = make_adapter(config_extra={"fan_in_fan_out": True}).layout.by_module[Q]
    assert (slot.m, slot.n, slot.weight_shape, slot.transposed) == (24, 16, (16, 24), True)


def test_other_tensors_are_whole() -> None:
    extra = {
        "base_model.model.score.weight": torch.ones(2, 3),
        "base_model.model.lm_head.base_layer.weight": torch.ones(4, 3),
        f"{KEY}.base_layer.bias": torch.ones(24),
        "base_model.model.norm.bias": torch.ones(3),
    }
    adapter = make_adapter(extra_tensors=extra, prefix="model.base_model.model.")
    assert [span.key for span in adapter.layout.whole] == sorted(extra)
    assert [span.parameter for span in adapter.layout.whole] == [
        "lm_head.weight",
        f"{Q}.bias",
        "norm.bias",
        "score.weight",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_B.bias",
        "lora_B.default.bias",
        "lora_diag",
        "lora_velora_embed",
        "lora_monteclora_sampler.weight",
        "token_adapter.trainable_tokens_delta",
        "lora_C.weight",
        "lora_A",
        "lora_B.wieght",
        "lora_embedding_C",
    ],
)
def test_tensors_of_variants_are_refused(name: str) -> None:
    error = refusal(changed(**{name.replace(".", "__"): torch.ones(8)}))
    assert error.field == f"{KEY}.{name}"


def test_a_whole_models_state_dict_is_refused() -> None:
    base = {
        f"base_model.model.{module}.base_layer.weight": torch.ones(shape)
        for module, shape in MODULES.items()
    }
    assert "get_peft_model_state_dict" in str(refusal(make_state_dict(extra_tensors=base)))
    original = {"base_model.model.score.original_module.weight": torch.ones(2, 2)}
    assert "get_peft_model_state_dict" in str(refusal(make_state_dict(extra_tensors=original)))


def test_tied_adapters_are_refused() -> None:
    state = make_state_dict(
        extra_tensors={
            "base_model.model.embed.lora_embedding_A": torch.ones(8, 30),
            "base_model.model.embed.lora_embedding_B": torch.ones(5, 8),
        }
    )
    assert refusal(state, ensure_weight_tying=True).field == "ensure_weight_tying"
    Adapter(make_state_dict(), make_config(config_extra={"ensure_weight_tying": True}))


@pytest.mark.parametrize("lacking", ["A", "B"])
def test_a_factor_without_its_partner_is_refused(lacking: str) -> None:
    error = refusal(changed(**{f"lora_{lacking}__weight": None}))
    assert error.module == Q
    assert error.problem == f"lora_{lacking} is missing"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((8, 16), (24, 4)),
        ((0, 16), (24, 0)),
        ((8, 0), (24, 8)),
        ((8, 16), (0, 8)),
        ((8,), (8,)),
        ((128,), (24, 8)),
        ((8, 16), (24, 8, 1)),
        ((8, 16, 3, 3), (24, 8)),
        ((8, 16, 3, 3), (24, 8, 3, 3)),
        ((8, 16, 3, 3), (24, 4, 1, 1)),
        ((8, 1, 1, 1, 1, 1), (8, 8, 1, 1, 1, 1)),
        ((4, 16), (24, 4)),
        ((), ()),
    ],
)
def test_shapes_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    error = refusal(changed(lora_A__weight=torch.ones(a), lora_B__weight=torch.ones(b)))
    assert error.module == Q
    assert error.expected is not None
    assert error.got is not None


def test_a_rank_that_contradicts_the_config_is_refused() -> None:
    error = refusal(make_state_dict(rank=4))
    assert (error.field, error.expected, error.got) == ("r", "rank 8", "rank 4")
    error = refusal(make_state_dict(), rank_pattern={"v_proj": 3})
    assert error.field == "rank_pattern"
    assert error.module is not None
    assert error.module.endswith("v_proj")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn, torch.complex64]
)
def test_dtypes_that_cannot_be_aggregated_are_refused(dtype: torch.dtype) -> None:
    error = refusal(changed(lora_A__weight=torch.ones(8, 16).to(dtype)))
    assert error.field == f"{KEY}.lora_A.weight"
    assert "Cast it to float32" in str(error)


@pytest.mark.parametrize("state", [{}, {"base_model.model.score.weight": torch.ones(2, 2)}])
def test_an_adapter_without_lora_modules_is_refused(state: dict[str, torch.Tensor]) -> None:
    assert "no LoRA module" in refusal(state).problem
