"""Clients trained by other processes: the same runs, failures of a process, timeouts, and stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from simulated_runs import assert_same_runs, configured, lines

pytest.importorskip("peft")
pytest.importorskip("pydantic")

import torch
from test_federated_simulation import stopping_in

from fastagg.federated.simulation import workers
from fastagg.federated.simulation.events import ClientFinished, ClientStep, Event
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.simulate import simulate


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Each of two workers computes with one of two threads: this process has to do so too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    yield
    torch.set_num_threads(threads)


def children() -> list[int]:
    found = psutil.Process().children(recursive=True)
    return [child.pid for child in found if "spawn_main" in " ".join(child.cmdline())]


def test_workers_give_the_results_of_one_process(settings: dict[str, Any], tmp_path: Path) -> None:
    """Methods that merge, that continue and that train all weights, one after the other in the same
    processes, and a run that goes on in new ones."""
    told: list[Event] = []
    options = {"federation__methods": "flora,full,flexlora", "federation__rounds": 2}
    alone = configured(settings, output__folder=tmp_path / "alone", **options)
    many = configured(
        settings, output__folder=tmp_path / "many", federation__workers=2, **options
    )
    assert simulate(alone)
    watch, stop = stopping_in(2)
    assert not simulate(many, observer=watch, stop=stop)
    assert not children()
    assert simulate(many, resume=True, observer=told.append)
    for method in ("flora", "full", "flexlora"):
        assert_same_runs(tmp_path / "alone" / method, tmp_path / "many" / method)
    finished = [event.client for event in told if isinstance(event, ClientFinished)]
    assert finished == ["a", "b", "c"] * 5
    assert {event.client for event in told if isinstance(event, ClientStep)} == {"a", "b", "c"}
    assert not children()


def test_a_process_that_dies_fails_its_client_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    killed: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, ClientStep) and event.client == "b" and not killed:
            # Both work; the one that told of b is found by what it has open.
            killed.extend(children())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    config = configured(settings, federation__workers=2, federation__rounds=2, training__epochs=40)
    assert simulate(config, observer=watch)
    rounds = [x for x in lines(tmp_path / "run" / "flexlora") if x["kind"] == "round"]
    assert "b" in rounds[1]["failures"]
    assert "exit code -9" in rounds[1]["failures"]["b"]
    assert rounds[1]["participants"] == 3 - len(rounds[1]["failures"])
    assert rounds[2]["participants"] == 3


def test_a_process_that_hangs_is_ended(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "GRACE", 1.0)
    # Where the machine is busy, one process may still be loading the model when it is stopped.
    monkeypatch.setattr(workers, "LOADING", 20.0)
    stopped: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, ClientStep) and event.client == "c" and not stopped:
            stopped.extend(children())
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)

    config = configured(
        settings,
        federation__workers=2,
        federation__rounds=1,
        federation__timeout=20,
        training__epochs=40,
        federation__min_clients=1,
        ranks__each="4,2,1",
    )
    started = time.monotonic()
    assert simulate(config, observer=watch)
    assert time.monotonic() - started < 120
    (line,) = [x for x in lines(tmp_path / "run" / "flexlora") if x["kind"] == "round"][1:]
    assert "took no step any more" in line["failures"]["c"]
    assert not children()


def test_a_client_that_is_late_fails_with_workers_too(settings: dict[str, Any]) -> None:
    from fastagg.federated.server.server import TooFewUpdates

    with pytest.raises(TooFewUpdates, match="longer than"):
        simulate(configured(settings, federation__timeout=1e-9, federation__workers=2))
    assert not children()


def test_a_bad_setting_is_heard_of_by_name(settings: dict[str, Any]) -> None:
    """What only a worker finds out ends the run as it would in one process."""
    from fastagg.errors import InvalidInput

    with pytest.raises(InvalidInput, match="target_modules"):
        simulate(configured(settings, lora__targets="no_such", federation__workers=2))


def test_ctrl_c_and_a_kill_leave_no_process_behind(settings: dict[str, Any], tmp_path: Path) -> None:
    import tomli_w

    settings["federation"] |= {"workers": 2, "rounds": 50, "methods": ["flora"]}
    settings["training"] |= {"epochs": 20}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(settings))
    script = "from fastagg.cli.app import main; main()"
    command = [sys.executable, "-c", script, "simulate", str(tmp_path / "run.toml")]
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([*command, "--resume"], start_new_session=True, stderr=-1, stdout=-1)
        run = RunFolder(tmp_path / "run" / "flora")
        reached = run.last_complete() + 1
        while run.last_complete() < reached:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        mine = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -9)
        deadline = time.monotonic() + 30
        while any(psutil.pid_exists(pid) for pid in mine) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in mine if psutil.pid_exists(pid)]
