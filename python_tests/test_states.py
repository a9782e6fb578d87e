"""A tree of servers by files: `fastagg aggregate --state` and `fastagg combine`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import MODULES, make_folder
from typer.testing import CliRunner, Result

from fastagg.adapter import Adapter
from fastagg.cli.app import app
from fastagg.errors import InvalidInput
from fastagg.folders.rounds import aggregate_folders
from fastagg.folders.states import hand_out_states, state_of_folders, state_of_states
from fastagg.rounds import state_file

RANKS = {"anna": 2, "ben": 8, "cleo": 4, "dora": 16}
WEIGHTS = {"anna": 100.0, "ben": 300.0, "cleo": 50.0, "dora": 10.0}


@pytest.fixture
def clients(tmp_path: Path) -> dict[str, Path]:
    return {
        name: make_folder(tmp_path / "clients" / name, rank=rank, alpha=2 * rank, seed=seed)
        for seed, (name, rank) in enumerate(RANKS.items())
    }


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Path]:
    """A file for each of two leaves."""
    files = {}
    for leaf in (("anna", "ben"), ("cleo", "dora")):
        files[leaf[0]] = tmp_path / f"{leaf[0]}.json"
        files[leaf[0]].write_text(json.dumps({name: WEIGHTS[name] for name in leaf}))
    return files


def fastagg(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def two_leaves(
    clients: dict[str, Path], weights: dict[str, Path], folder: Path, *options: object
) -> list[Path]:
    states = []
    for leaf in (("anna", "ben"), ("cleo", "dora")):
        state = folder / f"{leaf[0]}.safetensors"
        result = fastagg(
            "aggregate", *(clients[name] for name in leaf), "-m", "flexlora", "--state", state,
            "--weights", weights[leaf[0]], *options,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        states.append(state)
    return states


def delta(folder: Path, module: str) -> torch.Tensor:
    return Adapter.load(folder).delta(module).double()


def exact(clients: dict[str, Path], module: str) -> torch.Tensor:
    total = sum(WEIGHTS.values())
    return torch.stack([WEIGHTS[n] / total * delta(path, module) for n, path in clients.items()]).sum(0)


def test_a_tree_without_condensing_is_the_flat_round(
    clients: dict[str, Path], weights: dict[str, Path], tmp_path: Path
) -> None:
    states = two_leaves(clients, weights, tmp_path)
    above = tmp_path / "above.safetensors"
    assert fastagg("combine", *states, "--state", above).exit_code == 0
    assert fastagg("combine", above, "--out", tmp_path / "tree").exit_code == 0
    aggregate_folders(list(clients.values()), tmp_path / "flat", weights=WEIGHTS)
    files, others = (
        sorted(path.relative_to(out) for path in out.rglob("*"))
        for out in (tmp_path / "flat", tmp_path / "tree")
    )
    assert files == others
    for file in files:
        if file.suffix == ".safetensors" or file.name in ("adapter_config.json", "clients.json"):
            assert (tmp_path / "tree" / file).read_bytes() == (tmp_path / "flat" / file).read_bytes()


def test_a_condensed_tree_states_its_error(
    clients: dict[str, Path], weights: dict[str, Path], tmp_path: Path
) -> None:
    states = two_leaves(clients, weights, tmp_path, "--condense", 6)
    out = tmp_path / "tree"
    printed = fastagg("combine", *states, "--out", out)
    assert printed.exit_code == 0
    assert "condensing cost" in printed.output
    places = json.loads((out / "clients.json").read_text())
    assert set(places) == set(RANKS)
    errors = {m["module"]: m for m in json.loads((out / "report.json").read_text())["modules"]}
    for module in MODULES:
        whole = exact(clients, module)
        optimum = torch.linalg.svdvals(whole)[8:].norm()
        error = (delta(out / places["ben"], module) - whole).norm()
        cost = errors[module]["condensed_error"] * errors[module]["norm"]
        assert cost > 0
        assert error <= optimum + 2 * cost + 1e-5 * whole.norm()


def test_what_is_printed_of_a_state(
    clients: dict[str, Path], tmp_path: Path
) -> None:
    state = tmp_path / "leaf" / "state.safetensors"
    result = fastagg("aggregate", *clients.values(), "-m", "flexlora", "--state", state,
                     "--condense", 32, "--json")  # fmt: skip
    document = json.loads(result.stdout)
    assert document["clients"] == sorted(RANKS)
    assert document["bytes"] == state.stat().st_size
    assert document["condensed"] == 32
    again = fastagg("combine", state, "--state", tmp_path / "next", "--condense", 16)
    assert "condensed to rank 16" in again.output
    assert str(tmp_path / "next") in again.output


@pytest.mark.parametrize(("options", "word"), [
    ((), "either --out or --state"),
    (("--out", "o", "--state", "s"), "either --out or --state"),
    (("--out", "o", "--condense", "4"), "--condense is for --state"),
    (("--state", "s", "--ranks", "4"), "--ranks is for --out"),
    (("--state", "s", "--condense", "0"), "0"),
])
@pytest.mark.parametrize("name", ["aggregate", "combine"])
def test_options_that_do_not_go_together(
    clients: dict[str, Path], name: str, options: tuple[str, ...], word: str
) -> None:
    method = ("-m", "flexlora") if name == "aggregate" else ()
    result = fastagg(name, clients["anna"], *method, *options)
    assert result.exit_code == 2
    assert word in " ".join(result.output.replace("│", " ").split())


def test_a_dry_run_writes_no_state(clients: dict[str, Path], tmp_path: Path) -> None:
    result = fastagg("aggregate", *clients.values(), "-m", "flexlora", "--state", tmp_path / "s",
                     "--dry-run")  # fmt: skip
    assert result.exit_code == 2
    assert not (tmp_path / "s").exists()


def test_a_state_is_not_overwritten_unasked(clients: dict[str, Path], tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_text("mine")
    for report in (state_of_folders, state_of_states):
        with pytest.raises(InvalidInput, match="exists"):
            report([clients["anna"]], state)
    assert state.read_text() == "mine"
    state_of_folders([clients["anna"]], state, force=True)
    with pytest.raises(InvalidInput, match="is a folder"):
        state_of_folders([clients["anna"]], tmp_path / "clients", force=True)


def test_what_is_no_state_is_named(clients: dict[str, Path], tmp_path: Path) -> None:
    good = tmp_path / "good"
    state_of_folders([clients["anna"]], good)
    foreign = tmp_path / "foreign"
    state_file.write(foreign, {"fastagg": json.dumps({"round": 1}), "x": torch.zeros(1)})
    text = tmp_path / "text"
    text.write_text("no state")
    other = tmp_path / "other"
    state_of_folders([clients["ben"]], other, method="flora")
    for bad in (tmp_path / "absent", text, foreign, other, good):
        with pytest.raises(InvalidInput, match=bad.name):
            state_of_states([good, bad], tmp_path / "made")
        with pytest.raises(InvalidInput, match=bad.name):
            hand_out_states([good, bad], tmp_path / "out")
    with pytest.raises(InvalidInput, match="nothing to combine"):
        state_of_states([], tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()


def test_a_state_that_cannot_be_condensed_is_not_written(
    clients: dict[str, Path], tmp_path: Path
) -> None:
    result = fastagg("aggregate", *clients.values(), "-m", "flora", "--state", tmp_path / "s",
                     "--condense", 4)  # fmt: skip
    assert result.exit_code == 1
    assert "own factors" in result.output
    assert not (tmp_path / "s").exists()


def test_invalid_clients_may_be_left_out_of_a_state(
    clients: dict[str, Path], tmp_path: Path
) -> None:
    (clients["ben"] / "adapter_model.safetensors").write_bytes(b"broken")
    result = fastagg("aggregate", *clients.values(), "-m", "flexlora", "--state", tmp_path / "s",
                     "--skip-invalid", "--json")  # fmt: skip
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["clients"] == ["anna", "cleo", "dora"]
    assert [client["client"] for client in document["skipped"]] == ["ben"]
