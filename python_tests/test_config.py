"""The configuration, held against PEFT's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Tiny, make_config, make_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput
from fastagg.folders.rounds import aggregate_folders
from fastagg.peft_format.config import AdapterConfig


def parsed(**fields: Any) -> AdapterConfig:
    return AdapterConfig.from_dict(make_config(config_extra=fields), client="c7")


names = st.lists(st.sampled_from(["q", "v", "0", "1", "mlp", "q_proj"]), min_size=1, max_size=4)


modules = names.map(".".join)


keys = st.one_of(
    modules,
    modules.map(lambda name: "^" + name.replace(".", r"\.")),
    modules.map(lambda name: name + "$"),
    st.sampled_from(["q|v", ".*", r"\d+.q", "q.*", "mlp.(q|v)", "(0|1)", "^q", "^0.*"]),
)


@given(st.dictionaries(keys, st.integers(1, 99), max_size=5), modules)
@settings(max_examples=150, deadline=None)
def test_patterns_match_as_in_peft(pattern: dict[str, int], module: str) -> None:
    other = pytest.importorskip("peft.utils.other")
    expected = pattern.get(other.get_pattern_key(pattern.keys(), module), 8)
    config = parsed(rank_pattern=pattern, alpha_pattern=pattern)
    assert config.rank_of(module) == expected
    assert config.alpha_of(module) == pattern.get(other.get_pattern_key(pattern.keys(), module), 16)


def test_many_exact_patterns_are_matched_quickly_and_in_order() -> None:
    config = parsed(rank_pattern={"q": 3, r"^a\.q": 5, r"^b\.v": 7, "v": 9})
    assert [config.rank_of(m) for m in ("a.q", "b.v", "c.v", "x")] == [3, 7, 9, 8]


def test_scaling_of_rslora_is_pefts() -> None:
    config = parsed(r=8, lora_alpha=16, use_rslora=True, rank_pattern={"v": 3})
    assert config.scaling_of("q") == 16 / math.sqrt(8)
    assert config.scaling_of("a.v") == 16 / math.sqrt(3)


ranks_and_scalings = st.dictionaries(
    modules,
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 256), st.booleans()),
    min_size=1,
    max_size=6,
)


@given(ranks_and_scalings, st.booleans())
@settings(max_examples=150, deadline=None)
def test_with_ranks_gives_each_module_its_rank_and_scaling(
    wanted: dict[str, tuple[int, int, int, bool]], use_rslora: bool
) -> None:
    ranks = {module: rank for module, (rank, *_) in wanted.items()}
    scalings = {
        module: alpha / (math.sqrt(r) if rs else r) for module, (_, r, alpha, rs) in wanted.items()
    }
    base = parsed(use_rslora=use_rslora, rank_pattern={"q": 5}, alpha_pattern={".*": 3})
    made = base.with_ranks(ranks, scalings)
    for module, rank in ranks.items():
        assert made.rank_of(module) == rank
        assert made.scaling_of(module) == pytest.approx(scalings[module], rel=3e-16, abs=0)
    assert AdapterConfig.from_dict(json.loads(json.dumps(made.raw))) == made


def test_with_ranks_keeps_what_already_fits() -> None:
    base = parsed(use_rslora=True, rank_pattern={"v": 3}, layers_to_transform=[0, 1])
    own = ["a.q", "a.v"]
    ranks = {module: base.rank_of(module) for module in own}
    scalings = {module: base.scaling_of(module) for module in own}
    assert base.with_ranks(ranks, scalings, own_modules=own) == base
    fewer = base.with_ranks({"a.q": 8}, scalings, own_modules=own)
    assert fewer.raw["target_modules"] == ["a.q"]
    assert fewer.raw["layers_to_transform"] is None
    assert fewer.scaling_of("a.q") == base.scaling_of("a.q")


def test_a_name_without_a_dot_is_targeted_exactly() -> None:
    assert parsed().with_ranks({"fc": 2}, {"fc": 1.0}).raw["target_modules"] == "fc"


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_with_ranks_refuses_what_is_no_rank(rank: Any) -> None:
    with pytest.raises(InvalidInput, match="not a rank"):
        parsed().with_ranks({"a.q": rank}, {"a.q": 1.0})


@pytest.mark.parametrize("scaling", [0.0, math.nan, math.inf])
def test_with_ranks_refuses_an_unusable_scaling(scaling: float) -> None:
    with pytest.raises(InvalidInput, match="scaling"):
        parsed().with_ranks({"a.q": 4}, {"a.q": scaling})


def test_with_ranks_keeps_the_ranks_that_a_changed_base_depends_on() -> None:
    base = parsed(init_lora_weights="pissa")
    assert base.with_ranks({"a.q": 8}, {"a.q": 1.0}).changes_base == base.changes_base
    with pytest.raises(InvalidInput, match="path_initial_model_for_weight_conversion"):
        base.with_ranks({"a.q": 4}, {"a.q": 1.0})


@pytest.mark.parametrize(("init", "kept"), [("orthogonal", True), ("mica", True), ("eva", "eva")])
def test_an_initialisation_that_fits_few_ranks_goes_with_the_ranks(init: str, kept: object) -> None:
    base = parsed(init_lora_weights=init)
    assert base.with_ranks({"a.q": 8}, {"a.q": 2.0}).raw["init_lora_weights"] == init
    assert base.with_ranks({"a.q": 7}, {"a.q": 2.0}).raw["init_lora_weights"] == kept


TINY_RANKS = {"embed": 3, "blocks.0": 5, "blocks.1": 2, "conv2": 4, "head": 1}


TINY_SCALINGS = {
    "embed": 0.7,
    "blocks.0": 16 / math.sqrt(8),
    "blocks.1": 2.0,
    "conv2": 1e-3,
    "head": 5.0,
}


def test_peft_loads_the_ranks_and_scalings_of_with_ranks(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = parsed(
        use_rslora=True,
        rank_pattern={"blocks.*": 6},
        target_modules=["nothing"],
        init_lora_weights="orthogonal",
    )
    config = base.with_ranks(TINY_RANKS, TINY_SCALINGS)
    shapes = {"blocks.0": (10, 6), "blocks.1": (7, 10), "head": (4, 7)}
    folder = make_folder(
        tmp_path / "made",
        shapes,
        rank_pattern={"^" + module: rank for module, rank in TINY_RANKS.items()},
        extra_tensors={
            "base_model.model.embed.lora_embedding_A": torch.randn(3, 11),
            "base_model.model.embed.lora_embedding_B": torch.randn(6, 3),
            "base_model.model.conv2.lora_A.weight": torch.randn(4, 3, 3, 2),
            "base_model.model.conv2.lora_B.weight": torch.randn(5, 4, 1, 1),
        },
    )
    (folder / "adapter_config.json").write_text(json.dumps(config.raw))
    model = peft.PeftModel.from_pretrained(Tiny(), folder)
    found = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert {name: rank for name, (rank, _) in found.items()} == TINY_RANKS
    # No alpha has alpha / 3 == 0.7 in float64: the nearest is one unit in the last place away.
    scalings = {name: scaling for name, (_, scaling) in found.items()}
    assert scalings == pytest.approx(TINY_SCALINGS, rel=2**-52, abs=0)
    assert scalings["blocks.0"] == TINY_SCALINGS["blocks.0"]


def test_the_order_of_patterns_counts_and_is_kept(tmp_path: Path) -> None:
    """PEFT takes the first pattern that matches: the same ones in another order are another config."""
    module, patterns = "model.layers.0.self_attn.q_proj", {"layers.0.+q_proj": 32, "q_proj": 4}
    narrow = make_folder(tmp_path / "narrow", alpha_pattern=patterns)
    wide = make_folder(tmp_path / "wide", alpha_pattern=dict(reversed(patterns.items())))
    for folder, scaling in ((narrow, 4.0), (wide, 0.5)):
        adapter = Adapter.load(folder)
        assert adapter.scaling(module) == scaling
        adapter.save(tmp_path / "saved", overwrite=True)
        assert Adapter.load(tmp_path / "saved").scaling(module) == scaling
        aggregate_folders([folder], tmp_path / "out", method="flexlora", force=True)
        assert Adapter.load(tmp_path / "out/rank-8").scaling(module) == scaling


@given(st.dictionaries(modules, st.integers(1, 99), min_size=1, max_size=5), st.booleans())
@settings(max_examples=100, deadline=None)
def test_at_other_ranks_every_module_keeps_its_alpha(ranks: dict[str, int], rslora: bool) -> None:
    config = parsed(
        r=8, lora_alpha=5, alpha_pattern={"q": 7.0}, rank_pattern={"v": 3}, use_rslora=rslora
    )
    changed = config.at_ranks(ranks)
    for module, rank in ranks.items():
        assert changed.rank_of(module) == rank
        alpha = config.alpha_of(module)
        assert changed.scaling_of(module) == alpha / (math.sqrt(rank) if rslora else rank)
    assert changed.at_ranks(ranks) is changed


def test_at_other_ranks_an_initialisation_that_fits_few_is_not_repeated() -> None:
    assert parsed(init_lora_weights="orthogonal").at_ranks({"q": 3}).raw["init_lora_weights"] is True
    with pytest.raises(InvalidInput, match=r"derives the base weights"):
        parsed(init_lora_weights="pissa").at_ranks({"q": 3})
    with pytest.raises(InvalidInput, match=r"'q'.*not a rank"):
        parsed().at_ranks({"q": 0})
