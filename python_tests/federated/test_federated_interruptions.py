"""What comes between: other runs, other data, kills, hostile names and files, and the wish to stop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_runs import RANKS, assert_same_runs, configured, lines

pytest.importorskip("peft")
pytest.importorskip("pydantic")

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput
from fastagg.federated.clients.client import Client
from fastagg.federated.messages import ClientFailure
from fastagg.federated.simulation.cohort import Cohort
from fastagg.federated.simulation.events import ClientFinished, Event, PreTrainingStep, RoundFinished
from fastagg.federated.simulation.job import bring_to_round
from fastagg.federated.simulation.preparation import Prepared, locked
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.simulate import simulate


def named(settings: dict[str, Any], tmp_path: Path, names: tuple[str, ...]) -> None:
    """The same clients under other names."""
    data = Path(settings["data"]["path"])
    renamed = [json.loads(line) for line in data.read_text().splitlines()]
    for record in renamed:
        record["label"] = names["abc".index(record["label"])]
    data.write_text("\n".join(map(json.dumps, renamed)))


def test_clients_may_have_any_name(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also those of this package's own folders and methods: each goes on from its own adapter."""
    names = ("centralized", "merged", "updates")
    named(settings, tmp_path, names)
    options = {"federation__methods": "flexlora,flora,centralized", "federation__rounds": 2}
    assert simulate(configured(settings, **options))
    for method in ("flexlora", "flora", "centralized"):
        found = lines(tmp_path / "run" / method)
        assert tuple(line["client"] for line in found[1:4]) == names
        losses = [line["loss"] for line in found if line["kind"] == "round"]
        assert losses[-1] < losses[0] and not any(line.get("failures") for line in found)
    run = RunFolder(tmp_path / "run" / "flexlora")
    for name, rank in zip(names, RANKS, strict=True):
        adapter = Adapter.load(run.adapter(2, name))
        assert {adapter.rank(module) for module in adapter.modules} == {rank}
    # What one client is handed is in nobody's base: a run of the same clients by other processes,
    # which read all that was merged from the folder, comes to the same.
    cohort = Cohort.open(configured(settings, **options), Prepared(tmp_path / "run" / "cohort"))
    before = cohort.model.weights()
    bring_to_round(cohort.model, run, 3)
    assert all(torch.equal(before[name], weight) for name, weight in cohort.model.weights().items())


def test_one_run_at_a_time_in_a_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    config = configured(settings, federation__rounds=1)
    with (
        locked(tmp_path / "run"),
        pytest.raises(InvalidInput, match=r"another run.*output\.folder|output\.folder.*another run"),
    ):
        simulate(config)
    holder = "import sys; from pathlib import Path\n" \
        "from fastagg.federated.simulation.preparation import locked\n" \
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run")], stdin=-1, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(InvalidInput, match="another run"):
            simulate(config)
        process.kill()
    assert simulate(config)


def test_runs_of_a_folder_begin_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    """Another seed, model or set of examples would make the methods' comparison none."""
    assert simulate(configured(settings, federation__rounds=1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for options, field in (
        ({"seed": 4}, "seed"),
        ({"model__embedded__hidden": 32}, "model.embedded"),
        ({"data__held_out": 0.5}, "data"),
    ):
        with pytest.raises(InvalidInput, match=field):
            simulate(configured(settings, federation__methods="flora", **options))
    data = Path(settings["data"]["path"])
    whole = data.read_text()
    data.write_text(whole.replace("Repeat 3", "Repeat 4", 1))
    with pytest.raises(InvalidInput, match="another set of examples"):
        simulate(configured(settings, federation__rounds=2), resume=True)
    assert before == {path: path.read_bytes() for path in before}
    data.write_text(whole)
    assert simulate(configured(settings, federation__rounds=2), resume=True)


def test_a_folder_that_was_killed_at_its_beginning_can_be_resumed(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = configured(settings, federation__rounds=2)
    assert simulate(config)
    other = configured(settings, federation__rounds=2, output__folder=tmp_path / "other")
    run = tmp_path / "other" / "flexlora"
    run.mkdir(parents=True)
    (run / ".config.toml.0a1b2c3d").write_text("half")
    assert simulate(other, resume=True)
    assert_same_runs(tmp_path / "run" / "flexlora", run)
    assert not list(run.glob(".*"))


def test_a_line_that_was_cut_off_is_written_again(settings: dict[str, Any], tmp_path: Path) -> None:
    config = configured(settings)
    assert simulate(config)
    run = RunFolder(tmp_path / "run" / "flexlora")
    whole = lines(run.path)
    (run.round(3) / "COMPLETE").unlink()
    file = run.path / "metrics.jsonl"
    file.write_text(file.read_text()[:-30])
    assert simulate(config, resume=True)
    assert lines(run.path) == whole


def test_an_update_that_cannot_be_read_is_left_out(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Client.fit

    def truncated(self: Client, *args: Any, folder: Path, **options: Any) -> Any:
        update = plain(self, *args, folder=folder, **options)
        if self.name == "b":
            file = folder / "adapter_model.safetensors"
            file.unlink()  # the mapped one stays as it was
            file.write_bytes(b"\x10")
        return update

    monkeypatch.setattr(Client, "fit", truncated)
    assert simulate(configured(settings, federation__rounds=2))
    for line in lines(tmp_path / "run" / "flexlora"):
        if line["kind"] == "round" and line["round"]:
            assert list(line["failures"]) == ["b"] and line["participants"] == 2


def test_failures_of_a_round_that_was_repeated_are_told(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, tries = Client.fit, []

    def once(self: Client, *args: Any, **options: Any) -> Any:
        if self.name == "b" and not tries:
            tries.append(1)
            raise ClientFailure("b", 1, "its battery is empty")
        return plain(self, *args, **options)

    monkeypatch.setattr(Client, "fit", once)
    strict = {"federation__min_clients": 3, "federation__on_too_few": "repeat"}
    assert simulate(configured(settings, federation__rounds=1, **strict))
    line = next(x for x in lines(tmp_path / "run" / "flexlora") if x["kind"] == "round" and x["round"])
    assert line["participants"] == 3 and line["failures"] == {"b": "its battery is empty"}


@pytest.mark.parametrize("asked", [PreTrainingStep, RoundFinished, "last client"])
def test_the_wish_to_stop_is_heard_everywhere(
    settings: dict[str, Any], tmp_path: Path, asked: Any
) -> None:
    """Before the first round nothing is left; between rounds no other client trains; and a round whose
    clients have all trained is completed."""
    told: list[Event] = []

    def stop() -> bool:
        if asked == "last client":
            return any(isinstance(e, ClientFinished) and e.client == "c" for e in told)
        return any(isinstance(e, asked) and getattr(e, "round", 1) for e in told)

    config = configured(settings, federation__methods="flexlora,flora")
    assert not simulate(config, observer=told.append, stop=stop)
    finished = [(e.round, e.client) for e in told if isinstance(e, ClientFinished)]
    if asked is PreTrainingStep:
        assert not finished and not any((tmp_path / "run").glob("*"))
    else:
        assert finished == [(1, "a"), (1, "b"), (1, "c")]
        assert RunFolder(tmp_path / "run" / "flexlora").last_complete() == 1
        assert not (tmp_path / "run" / "flora").exists()


@pytest.mark.parametrize(("most", "clients"), [(0, None), (2, ["a", "b"]), (64, ["a", "b", "c"])])
def test_so_many_clients_are_compared(
    settings: dict[str, Any], tmp_path: Path, most: int, clients: list[str] | None
) -> None:
    assert simulate(configured(settings, federation__rounds=1, evaluation__similarity=most))
    file = RunFolder(tmp_path / "run" / "flexlora").round(1) / "similarity.json"
    assert file.exists() == bool(clients)
    if clients:
        assert json.loads(file.read_text())["clients"] == clients


@pytest.mark.parametrize(
    ("options", "field"),
    [({"federation__min_clients": 4, "federation__methods": "full"}, "min_clients"),
     ({"training__patience": 2, "data__held_out": 0.0}, "patience")],
)  # fmt: skip
def test_what_no_round_could_do_is_refused_before_any(
    settings: dict[str, Any], tmp_path: Path, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput, match=field):
        simulate(configured(settings, **options))
    assert not (tmp_path / "run").exists()
