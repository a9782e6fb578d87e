"""Which fields of a configuration are handled, harmless or refused; all of PEFT's."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from adapters import make_config

from fastagg.errors import InvalidInput
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.config_reader import HANDLED, HARMLESS, REFUSED


def parsed(**fields: Any) -> AdapterConfig:
    return AdapterConfig.from_dict(make_config(config_extra=fields), client="c7")


def refusal(**fields: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        parsed(**fields)
    assert caught.value.client == "c7"
    assert "c7" in str(caught.value)
    return caught.value


def test_every_field_of_peft_is_decided() -> None:
    peft = pytest.importorskip("peft")
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    assert set(fields) <= HANDLED | HARMLESS | set(REFUSED)
    assert not HANDLED & HARMLESS
    assert not (HANDLED | HARMLESS) & set(REFUSED)
    variants = {name for name, field in fields.items() if field.metadata.get("is_lora_variant")}
    assert variants <= set(REFUSED)


def test_the_config_that_peft_writes_passes() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules=["q", "v"],
        rank_pattern={"^a.q": 2},
        use_rslora=True,
        base_model_name_or_path="llama",
        task_type="CAUSAL_LM",
    )
    ours = AdapterConfig.from_dict(config.to_dict())
    assert (ours.rank, ours.alpha, ours.base_model) == (4, 32, "llama")
    assert ours.use_rslora
    assert ours.raw["target_modules"] == ["q", "v"]
    assert ours.changes_base is None
    assert json.loads(json.dumps(ours.raw))["peft_type"] == "LORA"


SET = {
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "use_bdlora": {},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {},
    "arrow_config": {"top_k": 3},
    "alora_invocation_tokens": [1, 2],
    "enable_lora": [True, False, True],
    "layer_replication": [[0, 4], [2, 5]],
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": {"embed_tokens": [0]},
}


def test_all_refused_fields_are_tried() -> None:
    assert set(SET) == set(REFUSED)


@pytest.mark.parametrize("field", sorted(SET))
def test_a_variant_is_refused_with_reason_and_cure(field: str) -> None:
    error = refusal(**{field: SET[field]})
    assert error.field == field
    assert field in str(error)
    assert error.problem == REFUSED[field][0]
    assert error.cure == REFUSED[field][1]


@pytest.mark.parametrize("field", sorted(SET))
@pytest.mark.parametrize("value", [None, False, []])
def test_a_variant_that_is_off_passes(field: str, value: object) -> None:
    assert parsed(**{field: value}).raw[field] == value


@pytest.mark.parametrize("value", [True, {"beta": 1}, ["q_proj"]])
def test_an_unknown_switch_is_refused(value: object) -> None:
    error = refusal(use_next_years_variant=value)
    assert error.field == "use_next_years_variant"
    assert "remove the field" in str(error)


@pytest.mark.parametrize("value", [None, False, 0, 16, 0.5, "mean", {}, []])
def test_an_unknown_parameter_passes(value: object) -> None:
    parsed(next_years_group_size=value)


@pytest.mark.parametrize("kind", [None, "LOHA", "ADALORA", "IA3", "PROMPT_TUNING", 7])
def test_other_types_are_refused(kind: object) -> None:
    error = refusal(peft_type=kind)
    assert error.field == "peft_type"
    assert error.expected == "'LORA'"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 8.0),
        ("r", True),
        ("r", None),
        ("r", "8"),
        ("lora_alpha", 0),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_alpha", 10**400),
        ("lora_alpha", 1e-300),
        ("lora_alpha", -1e300),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("rank_pattern", {"q": 0}),
        ("rank_pattern", {"q": 1.5}),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", ["q"]),
        ("alpha_pattern", {"q": 0}),
        ("alpha_pattern", {"*": 1}),
        ("alpha_pattern", 3),
        ("use_rslora", 1),
        ("fan_in_fan_out", "yes"),
        ("base_model_name_or_path", 7),
        ("init_lora_weights", "next_years_init"),
    ],
)
def test_a_value_that_peft_could_not_use_is_refused(field: str, value: object) -> None:
    error = refusal(**{field: value})
    assert error.field is not None
    assert error.field.startswith(field)


@pytest.mark.parametrize("raw", [[], "LORA", None, 3])
def test_what_is_no_object_is_refused(raw: Any) -> None:
    with pytest.raises(InvalidInput, match="not an object"):
        AdapterConfig.from_dict(raw, client="c7")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_plain_initialisations_keep_the_base(init: object) -> None:
    assert parsed(init_lora_weights=init).changes_base is None


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_changed_bases_are_told_apart(init: str) -> None:
    one = parsed(init_lora_weights=init)
    assert one.changes_base is not None
    assert init in one.changes_base
    assert one.changes_base == parsed(init_lora_weights=init, lora_dropout=0.3).changes_base
    assert one.changes_base != parsed(init_lora_weights=init, r=4).changes_base
    assert one.changes_base != parsed(init_lora_weights="pissa_niter_9").changes_base


@pytest.mark.parametrize(
    ("init", "field"),
    [("corda", "corda_config"), ("loftq", "loftq_config"), ("lora_ga", "lora_ga_config")],
)
def test_a_changed_base_depends_on_its_own_options(init: str, field: str) -> None:
    one = parsed(init_lora_weights=init, **{field: {"a": 1}})
    assert one.changes_base != parsed(init_lora_weights=init, **{field: {"a": 2}}).changes_base
