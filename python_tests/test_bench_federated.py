"""The federated measurement: the arithmetic of its table, and all of it on clients of a few lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from bench import federated, simulate_overhead
from bench.federated_losses import compared, table
from fastagg.errors import InvalidInput
from fastagg.federated.report.recorded_run import RecordedRun, read_runs
from fastagg.federated.simulation.config import RunConfig
from python_tests.federated.recorded_folders import client_row, round_row

SETTINGS = """
[model.embedded]
hidden = 16
feed_forward = 24
layers = 1
heads = 2
steps = 1
batch = 1
[data]
source = "folder"
path = "."
prompt = "plain"
length = 24
[ranks]
scheme = "each"
each = [4, 2]
[training]
epochs = 0
steps = 2
batch = 2
learning_rate = 1e-3
[federation]
methods = ["flora", "flexlora", "zeropad"]
rounds = 1
"""


def run_of(
    folder: Path, method: str, losses: Sequence[float], of_clients: Mapping[str, float]
) -> RecordedRun:
    """Two clients whose losses lie by `of_clients` beside the round's."""
    lines: list[dict[str, Any]] = []
    for number, loss in enumerate(losses):
        seconds = {"train": 8.0, "aggregate": 0.5, "evaluate": 90.0, "other": 1.5}
        lines.append(round_row(method, number, loss, **({"seconds": seconds} if number else {})))
        for name, beside in of_clients.items():
            distance = {"distance": 0.1 * number + beside, "optimal_distance": 0.1} if number else {}
            lines.append(client_row(method, number, name, 4, loss + beside, **distance))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return read_runs([folder])[0]


def test_the_settings_are_a_run() -> None:
    config = RunConfig.read(federated.CONFIG, {"data.path": "clients"})
    assert {"flora", "flexlora", "zeropad"} <= set(config.federation.methods)


def test_the_table_pairs_the_runs_of_a_seed(tmp_path: Path) -> None:
    beside = {"a": 0.25, "b": 0.75}
    ended = {0: {"flora": 3.0, "zeropad": 3.5}, 7: {"flora": 4.0, "zeropad": 3.75}}
    runs = {
        seed: [run_of(tmp_path / str(seed) / m, m, (6.0, last), beside) for m, last in of.items()]
        for seed, of in ended.items()
    }
    record = compared(1e-3, runs, {"a": 300, "b": 100})
    assert record["seeds"] == [0, 7]
    flora, zeropad = record["rows"]
    assert flora["losses"] == [[6.0, 3.0], [6.0, 4.0]]
    assert flora["weighted_losses"] == [[6.375, 3.375], [6.375, 4.375]]
    assert flora["losses_below_reference"] == [0.5, -0.25]
    assert flora["weighted_losses_below_reference"] == [0.5, -0.25]
    assert zeropad["losses_below_reference"] == [0.0, 0.0]
    assert flora["distance"] == pytest.approx([0.6, 0.6])
    assert flora["optimal_distance"] == pytest.approx([0.1, 0.1])
    assert flora["aggregation_share"] == pytest.approx([0.05, 0.05])
    text = table([record])
    assert "| 0.001 | `flora` | 6.00 ± 0.00 | 3.50 ± 0.50 | +0.50, -0.25 |" in text
    assert "| 0.001 | `flora` | 6.38 ± 0.00 | 3.88 ± 0.50 | +0.50, -0.25 |" in text
    assert "at most 5.00%" in text


def test_without_the_reference_there_are_no_differences(tmp_path: Path) -> None:
    record = compared(1e-3, {0: [run_of(tmp_path / "flora", "flora", (6.0, 3.0), {"a": 0.0})]}, {"a": 1})
    assert record["rows"][0]["losses_below_reference"] is None
    assert "below" not in table([record])


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Settings beside a folder of two clients, one of which has fewer examples than a round needs."""
    data = tmp_path / "clients"
    data.mkdir()
    for client, count in {"few": 3, "more": 9}.items():
        for split in ("train", "test"):
            lines = [
                json.dumps({"instruction": f"{client}?", "input": "x" * i, "output": f"{i}"})
                for i in range(count)
            ]
            (data / f"{client}.{split}.jsonl").write_text("\n".join(lines))
    path = tmp_path / "settings.toml"
    path.write_text(SETTINGS)
    return path


def test_a_bare_loop_of_other_work_is_noticed(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.read(settings, {"data.path": str(settings.parent / "clients")})
    steps = simulate_overhead._steps
    monkeypatch.setattr(simulate_overhead, "_steps", lambda n, batches, c: steps(n, batches[::-1], c))
    with pytest.raises(RuntimeError, match="did not do the clients' work"):
        simulate_overhead.run(config, ["zeropad"], repetitions=1)


def test_the_command_runs_records_and_does_not_run_again(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    options = ["--config", str(settings), "--data", str(tmp_path / "clients")]
    options += ["--out", str(tmp_path / "runs"), "--seeds", "0,1", "--rates", "1e-3,1e-2"]
    options += ["--threads", str(torch.get_num_threads()), "--record", str(record)]

    federated.main([*options, "--repetitions", "1"])
    first = capsys.readouterr().out
    document = json.loads(record.read_text())
    rates = [result.get("learning_rate") for result in document["results"]]
    assert rates == [1e-3, 1e-2, 1e-3, 1e-2, None]
    assert str(tmp_path) not in record.read_text()
    flexlora, zeropad = document["results"][2]["rows"]
    assert flexlora["distance"][0] < zeropad["distance"][0]
    assert 1 > flexlora["along"][0] > zeropad["along"][0] > 0
    metrics = tmp_path / "runs" / "rate-0.01" / "seed-1" / "flora" / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns

    federated.main([*options, "--repetitions", "0"])
    again = capsys.readouterr().out
    assert "held-out loss" in first and "held-out loss" not in again
    assert again[again.index("| learning rate") :].strip() in first
    assert metrics.stat().st_mtime_ns == written

    settings.write_text(SETTINGS.replace("batch = 2", "batch = 3"))
    with pytest.raises(InvalidInput, match="had other settings"):
        federated.main(options)
