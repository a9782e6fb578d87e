"""`fastagg simulate`: options over the file, what is printed, Ctrl-C, and going on after it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("peft")
pytest.importorskip("pydantic")

from fastagg.cli.app import app
from fastagg.federated.clients.client import Client
from fastagg.federated.messages import Handout
from fastagg.federated.simulation.config import RunConfig
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
    options = ("--methods", "flora,fedit", "--rounds", "2", "--seed", "7", "--set", "training.batch=3")
    result = simulated(config, *options)
    assert result.exit_code == 0, result.output
    for method in ("flora", "fedit"):
        assert f"{method}: 2 clients, 2 rounds" in result.stdout
        written = RunConfig.read(config.parent / "out" / method / "config.toml")
        assert (written.seed, written.training.batch, written.federation.rounds) == (7, 3, 2)
    assert result.stdout.count("round 2, held-out loss ") == 2


def test_a_finished_run_is_drawn(config: Path) -> None:
    result = simulated(config, "--methods", "flora,flexlora", "--rounds", "2")
    assert result.exit_code == 0, result.output
    out = config.parent / "out"
    assert f"report: {out / 'report.html'}" in result.stdout.replace("\n", "")
    for method in ("flora", "flexlora"):
        assert method in (out / "report.html").read_text()
        plots = sorted((out / method / "plots").glob("*.png"))
        assert plots and all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
        assert (out / method / "report.html").stat().st_size > 10_000
    assert simulated(config, "--rounds", "3", "--methods", "flora", "--resume").exit_code == 0
    plain = simulated(config, "--rounds", "1", "--set", "output.plots=false", "--out", str(out / "b"))
    assert plain.exit_code == 0 and not list((out / "b").rglob("*.html"))


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

    def interrupted(self: Client, handout: Handout, on_step: object = None) -> ClientUpdate:
        if handout.round == 2:
            os.kill(os.getpid(), signal.SIGINT)
        update = plain(self, handout)
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
        (("--set", "training.bach=3"), 1, "training.batch"),
        (("--set", "nothing"), 2, "NAME=VALUE"),
        (("--methods", "floora"), 1, "flora"),
        (("--set", "federation.workers=2"), 1, "federation.workers"),
    ],
)
def test_what_is_wrong_is_named(
    config: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = simulated(config, *arguments)
    assert result.exit_code == code
    assert message in result.output
    assert not (config.parent / "out").exists()
