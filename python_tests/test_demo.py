"""The demo's quick mode from end to end, its figures recomputed from the folders it left."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

pytest.importorskip("peft")
pytest.importorskip("transformers")

from fastagg import FastAggError
from fastagg.cli.app import app
from fastagg.demo.preset import METHODS, preset
from fastagg.demo.received import Received
from fastagg.demo.run import Outcome, run_demo
from fastagg.federated.clients.ranks import FLORA_RANKS
from fastagg.federated.data.corpus import language_reference
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.simulate import simulate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Matrices = dict[str, np.ndarray]

FLOAT32_ROUNDING = 3e-7
ALL_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class Run:
    def __init__(self, folder: Path) -> None:
        text = io.StringIO()
        self.folder = folder
        console = Console(file=text, width=200)
        self.outcome: Outcome = run_demo(folder, quick=True, console=console)
        self.printed = text.getvalue()

    def round(self, method: str, number: int = 1) -> Path:
        return self.folder / method / "rounds" / f"{number:04d}"

    def received(self, method: str) -> list[Received]:
        return [each for each in self.outcome.received if each.method == method]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost a model this small more than they give."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("demo") / "out")


def deltas(folder: Path) -> Matrices:
    """alpha / r B A of every module in float64, straight from the files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
            scaling = config["lora_alpha"] / config["r"]
            found[key.removesuffix(".lora_A.weight")] = scaling * (b @ a.astype(np.float64))
    return found


def exact(round: Path) -> Matrices:
    weights = json.loads((round / "weights.json").read_text())
    clients = {name: deltas(round / "updates" / name) for name in weights}
    total = sum(weights.values())
    return {
        module: sum(weights[name] / total * clients[name][module] for name in weights)
        for module in next(iter(clients.values()))
    }


def distance(received: Matrices, expected: Matrices) -> float:
    error = sum(np.square(received[m] - expected[m]).sum() for m in expected)
    return math.sqrt(error / sum(np.square(value).sum() for value in expected.values()))


def truncated(matrices: Matrices, rank: int) -> Matrices:
    best = {}
    for module, value in matrices.items():
        u, s, vt = np.linalg.svd(value, full_matrices=False)
        best[module] = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


def metrics(folder: Path, kind: str) -> list[dict[str, object]]:
    """The lines of a run, but for what is measured in seconds."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if "seconds" not in name}
        for line in lines
        if line["kind"] == kind
    ]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_distances_are_those_of_the_folders(run: Run) -> None:
    expected = exact(run.round("flora"))
    assert {each.method for each in run.outcome.received} == set(METHODS)
    for each in run.outcome.received:
        for client in each.clients:
            adapter = run.round(each.method) / ("merged" if each.stacked else f"adapters/{client}")
            again = distance(deltas(adapter), expected)
            assert each.distance == pytest.approx(again, rel=1e-6, abs=1e-9)
        best = distance(truncated(expected, each.rank), expected)
        assert each.optimum == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_all_methods_have_the_same_updates_in_the_first_round(run: Run) -> None:
    updates = [digests(run.round(method) / "updates") for method in METHODS]
    assert len(updates[0]) == 3
    assert updates.count(updates[0]) == len(METHODS)


def test_flora_is_exact_and_the_stack_goes_to_everyone(run: Run) -> None:
    (stack,) = run.received("flora")
    assert stack.stacked
    assert stack.rank == 12 + 6 + 3
    assert len(stack.clients) == 3
    assert stack.distance <= FLOAT32_ROUNDING


def test_flexlora_is_the_best_at_each_rank_and_padding_is_not(run: Run) -> None:
    flexlora, zeropad = run.received("flexlora"), run.received("zeropad")
    assert [each.rank for each in flexlora] == [12, 6, 3]
    for best, padded in zip(flexlora, zeropad, strict=True):
        assert (padded.rank, padded.clients) == (best.rank, best.clients)
        assert best.distance - best.optimum <= FLOAT32_ROUNDING
        assert padded.distance > best.distance + 0.05


def test_losses_are_those_of_the_runs_and_fall(run: Run) -> None:
    for each in run.outcome.received:
        rows = metrics(run.folder / each.method, "client")
        for number, shown in ((0, each.loss_before), (1, each.loss)):
            own = [
                row["held_out_loss"]
                for row in rows
                if row["round"] == number and row["client"] in each.clients
            ]
            assert len(own) == len(each.clients)
            assert shown == pytest.approx(np.mean(own))
            assert f"{shown:.4f}" in run.printed
    for method in ("flora", "flexlora"):
        before, one, two = (row["loss"] for row in metrics(run.folder / method, "round"))
        assert before > one > two


def test_every_method_has_two_rounds_in_the_table_of_runs(run: Run) -> None:
    assert [(each.method, each.rounds, each.clients) for each in run.outcome.runs] == [
        (method, 2, 3) for method in METHODS
    ]
    for each in run.outcome.runs:
        assert (run.round(each.method, 2) / "COMPLETE").exists()
        line = next(text for text in run.printed.splitlines() if text.startswith(f"│ {each.method}"))
        assert f"{each.first_loss:.4f}" in line
        assert f"{each.loss:.4f}" in line


def test_ends_with_where_its_report_lies(run: Run) -> None:
    label, report = run.printed.splitlines()[-1].split(": ")
    assert label == "report"
    page = Path(report).read_text()
    assert report == run.outcome.report == str(run.folder / "report.html")
    assert all(method in page for method in METHODS)
    sources = re.findall(r"(?:src|srcset|href)\s*=\s*[\"']([^\"']{0,40})", page)
    assert sources
    assert all(source.startswith("data:") for source in sources)


def test_commands_at_the_end_do_what_they_say(run: Run) -> None:
    """The third, which trains, is tried after an interruption."""
    given = [shlex.split(line) for line in run.printed.splitlines() if line.startswith("  fastagg ")]
    assert [words[1] for words in given] == ["inspect", "aggregate", "simulate"]
    for words in given[:2]:
        arguments = [
            str(path)
            for word in words[1:]
            for path in (sorted(Path(word).parent.glob("*")) if word.endswith("*") else [word])
        ]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    expected = exact(run.round("flexlora"))
    for each in run.received("flexlora"):
        by_hand = deltas(run.folder / "again" / f"rank-{each.rank}")
        assert distance(by_hand, expected) == pytest.approx(each.optimum, abs=FLOAT32_ROUNDING)


def test_all_projections_are_adapted_with_alpha_twice_the_rank(run: Run) -> None:
    for folder in (run.round("flora") / "updates").iterdir():
        assert {module.rpartition(".")[2] for module in deltas(folder)} == ALL_PROJECTIONS
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["lora_alpha"] == 2 * config["r"]


def test_same_seed_same_adapters_and_an_earlier_demo_is_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "demo.toml").write_text("")
    (tmp_path / "flora" / "rounds" / "0009").mkdir(parents=True)
    (tmp_path / "flora" / "rounds" / "0009" / "state.safetensors").write_bytes(b"stale")
    done = CliRunner().invoke(app, ["demo", "--quick", "--json", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for method in METHODS:
        again, before = tmp_path / method, run.folder / method
        assert digests(again) == digests(before)
        assert metrics(again, "client") == metrics(before, "client")
    found = json.loads(done.stdout)
    assert [each["distance"] for each in found["received"]] == [
        each.distance for each in run.outcome.received
    ]
    assert [each["loss"] for each in found["runs"]] == [each.loss for each in run.outcome.runs]
    assert Path(found["report"]).is_file()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FastAggError, match="--out"):
        run_demo(tmp_path, quick=True, console=Console(file=io.StringIO()))
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path)]).exit_code == 1
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "thesis.tex")]).exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_after_ctrl_c_the_command_that_it_names_goes_on(run: Run, tmp_path: Path) -> None:
    started = [sys.executable, "-m", "fastagg", "demo", "--quick", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        started,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("flexlora"):
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    (given,) = re.findall("`fastagg (.*)`", said)
    command, settings, option = shlex.split(given)
    assert (command, option) == ("simulate", "--resume")
    simulate(RunConfig.read(Path(settings)), resume=True)
    for method in METHODS:
        assert metrics(tmp_path / "out" / method, "client") == metrics(run.folder / method, "client")


def test_full_demo_is_floras_ten_clients() -> None:
    config = preset(Path("out"), seed=3)
    assert config.federation.methods == METHODS
    assert config.federation.rounds == 2
    assert config.ranks.scheme == "flora"
    assert config.data.clients == len(FLORA_RANKS) == 10
    assert sum(FLORA_RANKS) < config.model.embedded.hidden
    assert (config.seed, config.output.keep, config.output.folder) == (3, "all", "out")
    assert len(language_reference()) > 300_000


def test_settings_are_left_to_simulate_with(run: Run) -> None:
    assert RunConfig.read(run.folder / "demo.toml") == preset(run.folder, quick=True)
