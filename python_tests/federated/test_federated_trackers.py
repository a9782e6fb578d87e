"""Trackers: what they log is what metrics.jsonl holds, each round once, however often a run goes on."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("tensorboard")
pytest.importorskip("wandb")

import wandb
from recorded_folders import client_row, round_row
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastagg.errors import FastAggError, InvalidInput
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.events import RoundFinished, RunStarted
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.trackers import Trackers


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def settings(out: Path, *trackers: str, rounds: int = 3) -> RunConfig:
    output = {"folder": str(out), "trackers": list(trackers), "project": "mine"}
    return RunConfig.of({"output": output, "federation": {"methods": ["flora"], "rounds": rounds}})


def lines_of(number: int) -> list[dict[str, Any]]:
    seconds = {"train": 2.0, "aggregate": 0.5, "evaluate": 1.0, "other": 0.0}
    whole = round_row("flora", number, 3.0 - number, seconds=seconds, bytes_up=10 * number)
    return [whole, client_row("flora", number, "[a]/b", 4, 2.5 - number)]


def run(config: RunConfig, *numbers: int, resume: bool = False, unseen: tuple[int, ...] = ()) -> None:
    """Rounds as a simulation tells of them; of those ``unseen`` it was killed before it could."""
    folder = RunFolder(Path(config.output.folder) / "flora")
    done = folder.open(config, resume=resume)
    with Trackers(config) as trackers:
        trackers(RunStarted("flora", 3, ("[a]/b",), done))
        for number in numbers:
            folder.complete_round(number, lines_of(number))
            if number not in unseen:
                whole, *clients = lines_of(number)
                trackers(RoundFinished(number, whole, clients))


def tensorboard(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard itself reads them."""
    read = EventAccumulator(str(out / "flora" / "tensorboard")).Reload()
    tags = read.Tags()["scalars"]
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in tags}


def test_each_round_is_in_tensorboard_once(tmp_path: Path) -> None:
    config = settings(tmp_path / "out", "tensorboard")
    run(config, 0, 1)
    run(config, 2, resume=True)
    run(config, 3, resume=True)
    found = tensorboard(tmp_path / "out")
    assert found["loss"] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.0)]
    assert found["held_out_loss/[a]/b"] == [(0, 2.5), (1, 1.5), (2, 0.5), (3, -0.5)]
    assert found["seconds/aggregate"] == [(number, 0.5) for number in range(4)]
    assert found["bytes/up"][-1] == (3, 30.0)
    assert {"perplexity", "participants", "seconds/train", "bytes/down"} <= found.keys()
    assert "rouge_l" not in found  # was not measured
    assert not (tmp_path / "out" / "flora" / "wandb").exists()


def test_rounds_that_were_missed_are_made_up_for(tmp_path: Path) -> None:
    run(settings(tmp_path / "out"), 0, 1)
    config = settings(tmp_path / "out", "tensorboard", "wandb")
    run(config, 2, resume=True, unseen=(2,))
    time.sleep(1)  # W&B names folders by the second
    run(config, 3, resume=True)
    assert [step for step, _ in tensorboard(tmp_path / "out")["loss"]] == [0, 1, 2, 3]
    assert [row["_step"] for row in history(tmp_path / "out")] == [0, 1, 2, 3]


def records(out: Path) -> Iterator[Any]:
    """What W&B would send, of all times that the run went on."""
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its own process has written all
    for file in sorted((out / "flora" / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_log(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of such a log: blocks of 32 KiB, in them pieces with a header of 7 bytes."""
    place, record = 7, b""  # after the file's own header
    while place < len(data):
        if place % 32768 > 32768 - 7:  # no header fits into what is left of the block
            place += -place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def history(out: Path) -> list[Mapping[str, Any]]:
    found = []
    for record in records(out):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return found


def test_each_round_is_at_wandb_once_in_one_run(tmp_path: Path) -> None:
    run(settings(tmp_path / "out", "wandb"), 0, 1, 2)
    time.sleep(1)  # W&B names folders by the second
    run(settings(tmp_path / "out", "wandb", rounds=4), 3, resume=True)
    rows = history(tmp_path / "out")
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    assert [row["loss"] for row in rows] == [3.0, 2.0, 1.0, 0.0]
    assert rows[1]["train_loss/[a]/b"] == lines_of(1)[1]["train_loss"]
    runs = [record.run for record in records(tmp_path / "out") if record.HasField("run")]
    assert len({run.run_id for run in runs}) == 1 and len(runs) == 2
    assert {(run.project, run.display_name, run.run_group) for run in runs} == {("mine", "flora", "out")}
    federation = [c for c in runs[-1].config.update if c.key == "federation"]
    assert json.loads(federation[0].value_json)["rounds"] == 4


def interrupted(trackers: Trackers) -> None:
    trackers(RunStarted("flora", 3, ("[a]/b",), 0))
    trackers(RoundFinished(0, lines_of(0)[0]))
    raise KeyboardInterrupt


def test_they_are_closed_when_a_run_fails(tmp_path: Path) -> None:
    config = settings(tmp_path / "out", "tensorboard", "wandb")
    trackers = Trackers(config)
    RunFolder(tmp_path / "out" / "flora").open(config, resume=False)
    with pytest.raises(KeyboardInterrupt), trackers:
        interrupted(trackers)
    assert wandb.run is None
    ends = [each.exit.exit_code for each in records(tmp_path / "out") if each.HasField("exit")]
    assert ends == [1]
    assert tensorboard(tmp_path / "out")["loss"] == [(0, 3.0)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_one_that_is_not_installed_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidInput) as caught:
        Trackers(settings(tmp_path, name))
    assert caught.value.field == "output.trackers"
    assert caught.value.cure == "pip install 'fastagg[tracking]'"


def test_a_refused_login_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(FastAggError, match=r"No API key configured\. Log in .*WANDB_MODE=offline"):
        run(settings(tmp_path / "out", "wandb"), 0)
