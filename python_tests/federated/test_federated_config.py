"""The configuration: TOML in and out, options, and what is refused how."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fastagg.errors import InvalidInput
from fastagg.federated.clients.ranks import FLEXLORA_TYPES, SHARES
from fastagg.federated.clients.training import LocalTraining
from fastagg.federated.data.prompt import TEMPLATES
from fastagg.federated.simulation.config import RunConfig, all_settings
from fastagg.federated.simulation.settings import RanksSection
from fastagg.methods import names


def refused(settings: dict[str, Any], options: dict[str, str] | None = None) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        RunConfig.of(settings, options)
    return caught.value


def test_toml_is_read_under_options(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 3\n[training]\nbatch = 4\nclip = 2\n[lora]\ntargets = ["q_proj"]\n')
    config = RunConfig.read(path, {"training.batch": "16", "ranks.each": "8, 4,2"})
    assert (config.seed, config.training.batch, config.training.clip) == (3, 16, 2.0)
    assert (config.lora.targets, config.ranks.each) == (("q_proj",), (8, 4, 2))
    assert config.federation == RunConfig().federation


texts = st.text(st.characters(exclude_categories=("Cs",)))
sections = {
    "seed": st.integers(0, 2**62),
    "model": st.fixed_dictionaries({"name": texts}),
    "ranks": st.fixed_dictionaries(
        {"scheme": st.sampled_from(sorted(SHARES)), "each": st.lists(st.integers(1, 99), min_size=1)}
    ),
    "training": st.fixed_dictionaries(
        {"learning_rate": st.floats(1e-30, 1e30), "batch": st.integers(1, 9)}
    ),
    "evaluation": st.fixed_dictionaries({"answers": st.sampled_from([[], ["rouge-l"]])}),
}


@given(st.fixed_dictionaries({}, optional=sections))
def test_toml_written_is_the_same_configuration(settings: dict[str, Any]) -> None:
    config = RunConfig.of(settings)
    again = RunConfig.of(_loads(config.to_toml()))
    assert again == config
    assert again.to_toml() == config.to_toml()


def _loads(text: str) -> dict[str, Any]:
    from fastagg.federated.simulation.config import tomllib

    loaded: dict[str, Any] = tomllib.loads(text)
    return loaded


def test_every_setting_is_documented_and_an_option() -> None:
    settings = all_settings()
    assert len({setting.name for setting in settings}) == len(settings) > 60
    for setting in settings:
        assert setting.description.endswith("."), setting.name
        # What a default is written as gives the default.
        assert RunConfig.of({}, {setting.name: setting.default}) == RunConfig(), setting.name


def test_values_are_what_they_say() -> None:
    assert RunConfig.of({}, {"output.plots": "false"}).output.plots is False
    assert RunConfig.of({}, {"model.revision": "123e4"}).model.revision == "123e4"
    assert RunConfig.of({}, {"lora.targets": '["a.b", "c,d"]'}).lora.targets == ("a.b", "c,d")
    assert RunConfig.of({}, {"lora.targets": "all-linear"}).lora.target_modules == "all-linear"
    assert RunConfig.of({}, {"lora.targets": "q,v"}).lora.target_modules == ["q", "v"]
    assert RunConfig.of({}, {"ranks.memory": "1MiB, 2000"}).ranks.budgets() == (1 << 20, 2000)
    types = "[{rank = 1}, {rank = 2}, {rank = 2, feed_forward = 5}, {rank = 5}]"
    assert RunConfig.of({}, {"ranks.types": types}).ranks.types[2].feed_forward == 5


@pytest.mark.parametrize(
    ("settings", "field", "near"),
    [
        ({"training": {"learning_rat": 1}}, "training.learning_rat", "training.learning_rate"),
        ({"trainin": {"batch": 1}}, "trainin", "training"),
        ({"rounds": 3}, "rounds", "federation.rounds"),
        ({"data": {"column": {}}}, "data.column", "data.columns"),
        ({"data": {"columns": {"labels": "x"}}}, "data.columns.labels", "data.columns.label"),
        ({"model": {"hidden": 8}}, "model.hidden", "model.embedded.hidden"),
        # An unknown name explains what else is wrong.
        ({"seed": -1, "training": {"epoch": 3}}, "training.epoch", "training.epochs"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    settings: dict[str, Any], field: str, near: str
) -> None:
    error = refused(settings)
    assert (error.field, error.cure) == (field, f"Did you mean {near!r}?")


def test_unknown_options_are_refused_with_the_nearest() -> None:
    assert refused({}, {"federation.round": "3"}).cure == "Did you mean 'federation.rounds'?"
    assert refused({}, {"seed.x": "3"}).field == "seed"
    assert refused({"seed": 3}, {"seed.x": "3"}).field == "seed.x"
    assert refused({}, {"zzzzzz": "3"}).cure is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "-1"),
        ("seed", "x"),
        ("training.learning_rate", "nan"),
        ("training.learning_rate", "0"),
        ("training.batch", "2.5"),
        ("training.schedule", "step"),
        ("federation.participation", "0"),
        ("federation.participation", "1.1"),
        ("federation.optimiser", "adam"),
        ("ranks.scheme", "pareto"),
        ("ranks.each", "8,x"),
        ("ranks.each", ""),
        ("ranks.memory", "5 bananas"),
        ("ranks.memory", ""),
        ("ranks.types", "[{rank = 1}]"),
        ("lora.targets", "[1"),
        ("lora.dropout", "1"),
        ("data.length", "1"),
        ("federation.methods", "flora,flexlor"),
        ("federation.methods", "flora,flora"),
        ("output.plots", "perhaps"),
    ],
)
def test_values_that_are_none_of_a_setting_are_refused_by_its_name(name: str, text: str) -> None:
    field = refused({}, {name: text}).field
    assert field is not None and field.startswith(name)


def test_flags_are_no_numbers() -> None:
    assert refused({"seed": True}).field == "seed"
    assert refused({"training": {"clip": False}}).field == "training.clip"


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert refused({"training": {"epochs": 1, "steps": 5}}).cure == "Set the other to 0"
    assert RunConfig.of({"training": {"epochs": 0, "steps": 5}}).training.steps == 5
    assert refused({"data": {"source": "folder"}}).field == "data.path"
    data = {"source": "jsonl", "path": "a.jsonl", "partition": "dirichlet"}
    assert refused({"data": data}).field == "data.columns.label"
    assert RunConfig.of({"data": {**data, "columns": {"label": "kind"}}}).data.alpha == 0.5
    assert refused({"data": {"template": {"with_input": "{x}"}}}).field == "data.template.with_input"


def test_methods_are_all_that_there_are() -> None:
    everything = ",".join((*names(), "full", "centralized"))
    assert RunConfig.of({}, {"federation.methods": everything}).federation.methods[-1] == "centralized"
    assert refused({}, {"federation.methods": "flexlor"}).cure == "Did you mean 'flexlora'?"


def test_files_that_are_no_toml_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("seed = ")
    with pytest.raises(InvalidInput, match=r"a\.toml"):
        RunConfig.read(tmp_path / "a.toml")
    with pytest.raises(InvalidInput, match=r"none\.toml"):
        RunConfig.read(tmp_path / "none.toml")


def test_a_configuration_is_frozen_and_its_settings_stay_as_given() -> None:
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    given_settings = {"training": {"batch": 4}}
    RunConfig.of(given_settings, {"training.batch": "5"})
    assert given_settings == {"training": {"batch": 4}}
    assert tomli_w.dumps(config.model_dump(mode="json")) == config.to_toml()


def test_defaults_are_those_of_the_modules_they_are_for() -> None:
    assert tuple(kind.ranks() for kind in RanksSection().types) == FLEXLORA_TYPES
    assert RunConfig().data.prompt_template() == TEMPLATES["alpaca"]
    own_text = {"data": {"template": {"without_input": "Q: {instruction} A: "}}}
    own = RunConfig.of(own_text).data.prompt_template()
    assert own.without_input == "Q: {instruction} A: "
    assert own.with_input == TEMPLATES["alpaca"].with_input
    section, training = RunConfig().training, LocalTraining()
    for field in dataclasses.fields(LocalTraining):
        # 0 in TOML, which has no null, is None there.
        assert (getattr(section, field.name) or None) == (getattr(training, field.name) or None)
