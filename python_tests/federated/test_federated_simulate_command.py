"""`fastagg simulate`: settings as options, what is printed and drawn, Ctrl-C, and going on after it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("peft")
pytest.importorskip("pydantic")

from fastagg.cli.app import app
from fastagg.cli.setting_options import _options
from fastagg.federated.clients.client import Client
from fastagg.federated.messages import Handout
from fastagg.federated.simulation.config import RunConfig, all_settings, tomllib
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.update import ClientUpdate

SETTINGS = """
[model]
device = "cpu"
embedded = {{hidden = 16, feed_forward = 24, layers = 1, heads = 2, steps = 0}}
[data]
source = "jsonl"
path = "{data}"
clients = 2
length = 24
prompt = "plain"
columns = {{input = ""}}
[ranks]
scheme = "each"
each = [2]
[training]
batch = 4
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = tmp_path / "data.jsonl"
    records = [{"instruction": f"Say {i}", "output": f"{i}"} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, records)))
    path = tmp_path / "run.toml"
    path.write_text(SETTINGS.format(data=data))
    return path


def simulated(config: Path, *arguments: str) -> Result:
    out = config.parent / "out"
    return CliRunner().invoke(app, ["simulate", str(config), "--out", str(out), *arguments])


def test_options_win_over_the_file(config: Path) -> None:
    options = ("--methods", "flora,fedit", "--rounds", "2", "--seed", "7", "--training.batch", "3")
    result = simulated(config, *options)
    assert result.exit_code == 0, result.output
    for method in ("flora", "fedit"):
        assert f"{method}: 2 clients, 2 rounds" in result.stdout
        written = RunConfig.read(config.parent / "out" / method / "config.toml")
        assert (written.seed, written.training.batch, written.federation.rounds) == (7, 3, 2)
    assert result.stdout.count("round 2, held-out loss ") == 2


def test_every_setting_is_an_option_and_the_file_may_be_left_out(config: Path) -> None:
    found = tomllib.loads(config.read_text())
    del found["model"]["embedded"], found["data"]["columns"]
    given = {f"{part}.{name}": value for part, values in found.items() for name, value in values.items()}
    embedded = {"hidden": 16, "feed-forward": 24, "layers": 1, "heads": 2, "steps": 0}
    given |= {f"model.embedded.{name}": value for name, value in embedded.items()}
    given |= {"ranks.each": "2,4", "data.columns.input": "", "lora.targets": "q_proj,v_proj"}
    given |= {"federation.rounds": 1, "output.folder": config.parent / "out", "output.plots": "false"}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["simulate", *options])
    assert result.exit_code == 0, result.output
    written = RunConfig.read(config.parent / "out" / "flexlora" / "config.toml")
    assert written == RunConfig.of(
        {},
        {name.replace("-", "_"): str(value) for name, value in given.items()},
    )
    assert (written.model.embedded.feed_forward, written.ranks.each) == (24, (2, 4))
    assert written.lora.targets == ("q_proj", "v_proj")


def test_the_help_has_every_setting_by_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    text = CliRunner().invoke(app, ["simulate", "--help"]).stdout
    lines = text.splitlines()
    for setting in all_settings():
        line = next(each for each in lines if f"--{setting.name} " in each)
        assert setting.kind in line and setting.description in line
        if setting.section:
            heading = f"{setting.section}: {setting.section_description[:-1]}"
            panel = text[: text.index(f"--{setting.name} ")].rpartition("╭")[2]
            assert heading in panel.partition("\n")[0]
        if setting.default:
            assert f"[default: {setting.default}]" in text
    assert "One of iid, dirichlet, label." in text


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _options.cache_clear()
    monkeypatch.setitem(sys.modules, "fastagg.federated.simulation.config", None)
    result = CliRunner().invoke(app, ["simulate", "--rounds", "1"])
    assert result.exit_code == 1 and "pip install 'fastagg[federated]'" in result.stderr


def test_a_finished_run_is_drawn_compared_and_tracked(config: Path) -> None:
    result = simulated(config, "--methods", "flora,flexlora", "--rounds", "2")
    assert result.exit_code == 0, result.output
    out = config.parent / "out"
    assert f"report: {out / 'report.html'}" in result.stdout.replace("\n", "")
    assert all(f"loss {when}" in result.stdout for when in ("before", "after"))
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for method in ("flora", "flexlora"):
        assert method in (out / "report.html").read_text()
        plots = sorted((out / method / "plots").glob("*.png"))
        assert plots and all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
        assert (out / method / "report.html").stat().st_size > 10_000
    more = ("--methods", "flora", "--resume", "--output.trackers", "tensorboard")
    assert simulated(config, "--rounds", "3", *more).exit_code == 0
    assert list((out / "flora" / "tensorboard").iterdir())
    plain = simulated(config, "--rounds", "1", "--output.plots=false", "--out", str(out / "b"))
    assert plain.exit_code == 0 and "loss after" in plain.stdout
    assert not [*(out / "b").rglob("*.html"), *(out / "b").rglob("*.png")]


def test_json_is_the_last_round_of_each_method(config: Path) -> None:
    result = simulated(config, "--rounds", "1", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    lines = RunFolder(config.parent / "out" / "flexlora").metrics()
    assert found["methods"]["flexlora"] in lines
    assert found["methods"]["flexlora"]["round"] == 1


def test_ctrl_c_ends_after_the_client_and_resume_goes_on(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Client.fit
    finished = []

    def interrupted(
        self: Client, handout: Handout, on_step: Any = None, **options: Any
    ) -> ClientUpdate:
        if handout.round == 2:
            os.kill(os.getpid(), signal.SIGINT)
        update = plain(self, handout, on_step, **options)
        finished.append((handout.round, self.name))
        return update

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(Client, "fit", interrupted)
        result = simulated(config, "--rounds", "3")
    assert result.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [round for round, _ in finished] == [1, 1, 2]
    folder = RunFolder(config.parent / "out" / "flexlora")
    assert folder.last_complete() == 1
    result = simulated(config, "--rounds", "3", "--resume")
    assert result.exit_code == 0, result.output
    assert "after round 1" in result.stdout
    assert folder.last_complete() == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--training.bach", "3"), 2, "--training.batch"),
        (("--rounds", "3", "--federation.rounds", "4"), 2, "'3' already"),
        (("--out", "elsewhere", "--output.folder", "here"), 2, "'elsewhere' already"),
        (("--output.trackers", "tensorbord"), 1, "output.trackers"),
        (("--methods", "floora"), 1, "flora"),
        (("--federation.workers=0",), 1, "federation.workers"),
    ],
)
def test_what_is_wrong_is_named(
    config: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = simulated(config, *arguments)
    assert result.exit_code == code
    assert message in result.output
    assert not (config.parent / "out").exists()
