"""The command line: what each command prints, its exit codes, and that failures leave nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import MODULES, make_folder
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from fastagg.adapter import Adapter
from fastagg.cli.app import app
from fastagg.folders.rounds import aggregate_folders, client_folders
from fastagg.folders.weights_file import client_weights, read_weights
from fastagg.report import Report

RANKS = {"anna": 2, "ben": 8, "cleo": 4}
WEIGHTS = {"anna": 100.0, "ben": 300.0, "cleo": 50.0}


@pytest.fixture
def clients(tmp_path: Path) -> list[Path]:
    return [
        make_folder(tmp_path / "clients" / name, rank=rank, alpha=2 * rank, seed=seed)
        for seed, (name, rank) in enumerate(RANKS.items())
    ]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(WEIGHTS))
    return path


def fastagg(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastagg", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def refused(result: Result, code: int, *words: str) -> None:
    """An exit code, one sentence on stderr that says what is wrong, no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    flat = " ".join(result.stderr.replace("│", " ").split())
    for word in words:
        assert word in flat, (word, flat)


def exact(folders: list[Path], weights: dict[str, float], module: str) -> torch.Tensor:
    """sum p_k s_k B_k A_k in float64, from the files."""
    total = sum(weights[folder.name] for folder in folders)
    found = torch.zeros(MODULES[module], dtype=torch.float64)
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        state = load_file(folder / "adapter_model.safetensors")
        a = state[f"base_model.model.{module}.lora_A.weight"].double()
        b = state[f"base_model.model.{module}.lora_B.weight"].double()
        found += weights[folder.name] / total * config["lora_alpha"] / config["r"] * (b @ a)
    return found


class TestAggregate:
    def test_flexlora_hands_each_client_the_best_of_its_rank(
        self, clients: list[Path], weights: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        result = fastagg(
            "aggregate", *clients, "--method", "flexlora", "--weights", weights, "--out", out
        )
        assert result.exit_code == 0, result.output
        places = json.loads((out / "clients.json").read_text())
        assert places == {name: f"rank-{rank}" for name, rank in RANKS.items()}
        for name, rank in RANKS.items():
            adapter = Adapter.load(out / places[name])
            for module in MODULES:
                dw = exact(clients, WEIGHTS, module)
                optimum = torch.linalg.svdvals(dw)[rank:].norm()
                error = (adapter.delta(module).double() - dw).norm()
                assert error <= optimum + 2e-6 * dw.norm()
        report = Report.from_json((out / "report.json").read_text())
        assert [client.weight for client in report.clients] == list(WEIGHTS.values())
        assert {module.rank_sum for module in report.modules} == {14}
        for word in ("anna", "rank-2", "peak memory", "certificate", "q_proj"):
            assert word in result.stdout
        assert result.stderr == ""

    def test_flora_writes_the_stack(self, clients: list[Path], weights: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        result = fastagg("aggregate", *clients, "-m", "flora", "--weights", weights, "-o", out)
        assert result.exit_code == 0, result.output
        assert sorted(path.name for path in out.iterdir()) == [
            "clients.json",
            "report.json",
            "stacked",
        ]
        stack = Adapter.load(out / "stacked")
        for module in MODULES:
            dw = exact(clients, WEIGHTS, module)
            assert (stack.delta(module).double() - dw).norm() <= 1e-6 * dw.norm()

    def test_options_reach_the_aggregator(self, clients: list[Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        result = fastagg(
            *("aggregate", *clients, "-m", "flexlora", "-o", out, "--ranks", "4, 6"),
            *("--dtype", "bfloat16", "--route", "qr", "--accumulator", "dense", "--seed", 3),
            *("--missing", "zero", "--device", "cpu", "--max-memory", "1GiB", "--json"),
        )
        assert result.exit_code == 0, result.output
        assert json.loads((out / "clients.json").read_text()) == {
            "anna": "rank-4",
            "ben": "rank-6",
            "cleo": "rank-4",
        }
        assert Adapter.load(out / "rank-6").dtype == torch.bfloat16
        report = json.loads(result.stdout)
        assert report["accumulator"] == "dense"
        assert report["missing"] == "zero"
        assert {"4", "6"} == set(report["modules"][0]["kept"])

    def test_json_is_the_report_and_nothing_else(
        self, clients: list[Path], weights: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        done = process("aggregate", *clients, "-m", "flexlora", "-o", out, "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        printed = json.loads(done.stdout)
        assert printed.pop("out") == str(out)
        written = json.loads((out / "report.json").read_text())
        assert {key: printed[key] for key in ("method", "clients", "schema")} == {
            key: written[key] for key in ("method", "clients", "schema")
        }

    @pytest.mark.parametrize("extra", [[], ["--json"], ["--ranks", "4"], ["-m", "flora"]])
    def test_a_dry_run_writes_nothing(
        self, clients: list[Path], weights: Path, tmp_path: Path, extra: list[str]
    ) -> None:
        before = sorted(tmp_path.rglob("*"))
        out = tmp_path / "some" / "out"
        base = ["aggregate", *clients, "-m", "flexlora", "--weights", weights, "-o", out]
        result = fastagg(*base, "--dry-run", *extra)
        assert result.exit_code == 0, result.output
        assert sorted(tmp_path.rglob("*")) == before
        if "--json" not in extra:
            assert "nothing was written" in result.stdout
            return
        planned = json.loads(result.stdout)
        assert planned["memory"] > 0
        assert {module["rank_sum"] for module in planned["modules"]} == {14}
        assert fastagg(*base).exit_code == 0
        report = json.loads((out / "report.json").read_text())
        assert planned["accumulator"] == report["accumulator"]
        assert [m["route"] for m in planned["modules"]] == [m["route"] for m in report["modules"]]
        written = sorted(path.name for path in out.iterdir() if path.is_dir())
        assert sorted(folder["folder"] for folder in planned["folders"]) == written
        for folder in planned["folders"]:
            assert Adapter.load(out / folder["folder"]).nbytes == folder["bytes"]

    def test_a_dry_run_reads_every_number(self, clients: list[Path], tmp_path: Path) -> None:
        poison(clients[1])
        out = tmp_path / "out"
        result = fastagg("aggregate", *clients, "-m", "flora", "-o", out, "--dry-run")
        refused(result, 1, "'ben'", "NaN")
        arguments = ("--dry-run", "--skip-invalid", "--json")
        result = fastagg("aggregate", *clients, "-m", "flora", "-o", out, *arguments)
        assert result.exit_code == 0, result.output
        planned = json.loads(result.stdout)
        assert [client["client"] for client in planned["clients"]] == ["anna", "cleo"]
        assert [client["client"] for client in planned["skipped"]] == ["ben"]
        assert {module["rank_sum"] for module in planned["modules"]} == {6}

    def test_skip_invalid_names_who_was_left_out(
        self, clients: list[Path], weights: Path, tmp_path: Path
    ) -> None:
        poison(clients[1])
        odd = make_folder(tmp_path / "clients" / "odd", {"model.layers.0.self_attn.q_proj": (9, 9)})
        empty = tmp_path / "clients" / "empty"
        empty.mkdir()
        everyone = {**WEIGHTS, "odd": 1, "empty": 1}
        weights.write_text(json.dumps(everyone))
        out = tmp_path / "out"
        arguments = ("-m", "flexlora", "--weights", weights, "-o", out)
        refused(fastagg("aggregate", *clients, odd, empty, *arguments), 1)
        assert not out.exists()
        result = fastagg("aggregate", *clients, odd, empty, *arguments, "--skip-invalid")
        assert result.exit_code == 0, result.output
        for name, why in {"ben": "NaN", "odd": "shape", "empty": "adapter_config.json"}.items():
            line = next(line for line in result.stderr.splitlines() if f"left out {name}" in line)
            assert why in line
        report = Report.from_json((out / "report.json").read_text())
        assert sorted(client.client for client in report.skipped) == ["ben", "empty", "odd"]
        assert [client.client for client in report.clients] == ["anna", "cleo"]
        left = [clients[0], clients[2]]
        for module in MODULES:
            dw = exact(left, WEIGHTS, module)
            best = Adapter.load(out / "rank-4").delta(module).double()
            assert (best - dw).norm() <= torch.linalg.svdvals(dw)[4:].norm() + 2e-6 * dw.norm()

    def test_skipping_everyone_is_an_error(self, clients: list[Path], tmp_path: Path) -> None:
        for folder in clients:
            poison(folder)
        out = tmp_path / "out"
        result = fastagg("aggregate", *clients, "-m", "flora", "-o", out, "--skip-invalid")
        refused(result, 1, "none of the 3 clients is valid")
        assert not out.exists()

    def test_the_budget_is_refused_before_work(self, clients: list[Path], tmp_path: Path) -> None:
        poison(clients[2])
        out = tmp_path / "out"
        result = fastagg("aggregate", *clients, "-m", "flexlora", "-o", out, "--max-memory", "1kB")
        refused(result, 1, "max_memory", "bytes")
        assert "NaN" not in result.stderr
        assert not out.exists()

    def test_an_existing_out_needs_force(self, clients: list[Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "precious").write_text("x")
        arguments = ("aggregate", *clients, "-m", "flora", "-o", out)
        refused(fastagg(*arguments), 1, "exists", "--force")
        assert (out / "precious").exists()
        assert fastagg(*arguments, "--force").exit_code == 0
        assert not (out / "precious").exists()

    def test_out_in_what_is_no_folder(self, clients: list[Path], tmp_path: Path) -> None:
        (tmp_path / "note").write_text("")
        result = fastagg("aggregate", *clients, "-m", "flora", "-o", tmp_path / "note" / "out")
        refused(result, 1, "note is no folder")

    @pytest.mark.parametrize("method", ["zeropad", "hetlora"])
    def test_modules_that_only_a_later_client_has(self, tmp_path: Path, method: str) -> None:
        few = {name: shape for name, shape in MODULES.items() if "layers.0" in name}
        first = make_folder(tmp_path / "first", modules=few, rank=8)
        second = make_folder(tmp_path / "second", rank=4, seed=1)
        trees = []
        for order in ([first, second], [second, first]):
            result = fastagg("aggregate", *order, "-m", method, "-o", tmp_path / "o", "--force")
            assert result.exit_code == 0, result.output
            found = load_file(tmp_path / "o" / "rank-4" / "adapter_model.safetensors")
            trees.append({key: value.tolist() for key, value in found.items()})
        assert trees[0] == trees[1]
        assert len(trees[0]) == 2 * len(MODULES)

    def test_out_never_overlaps_a_client(self, clients: list[Path], tmp_path: Path) -> None:
        for out in (clients[0], clients[0] / "out", clients[0].parent):
            result = fastagg("aggregate", *clients, "-m", "flora", "-o", out, "--force")
            refused(result, 1, "overlaps")
        assert Adapter.load(clients[0])

    def test_memory_and_room_are_told_as_sentences(
        self, clients: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        out = tmp_path / "out"
        refused(fastagg("aggregate", *clients, "-m", "flora", "-o", out), 1, "disk", "10 bytes")
        assert not out.exists()


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["aggregate", "--method", "flora", "--out", "o"], ["FOLDER"]),
            (["aggregate", "c", "--out", "o"], ["--method"]),
            (["aggregate", "c", "--method", "flora"], ["--out"]),
            (["aggregate", "c", "-m", "flexlara", "-o", "o"], ["flexlara", "'flexlora'"]),
            (["aggregate", "c", "-m", "flexlora", "-o", "o", "--ranks", "4,x"], ["4,x"]),
            (["aggregate", "c", "-m", "flexlora", "-o", "o", "--ranks", "0"], ["'0'"]),
            (["aggregate", "c", "-m", "flexlora", "-o", "o", "--ranks", "9" * 5000], ["999..."]),
            (["aggregate", "c", "-m", "flora", "-o", "o", "--ranks", "4"], ["rank"]),
            (["aggregate", "c", "-m", "flora", "-o", "o", "--max-memory", "lots"], ["lots"]),
            (["aggregate", "c", "-m", "flora", "-o", "o", "--device", "tpu"], ["tpu"]),
            (["aggregate", "c", "-m", "flora", "-o", "o", "--accumulator", "dense"], ["flora"]),
            (["aggregate", "c", "-m", "flora", "-o", "o", "--seed", "-1"], ["--seed"]),
            (["aggregate", "c", "-m", "flora", "-o", "o", "--seed", str(2**63)], ["--seed"]),
            (["merge", "--base", "b", "--out", "o"], ["--adapter"]),
            (["merge", "--base", "b", "--adapter", "a", "--out", "o", "--tied", "x"], ["'x'"]),
            (["inspect"], ["FOLDER"]),
            (["validate"], ["FOLDER"]),
            (["demo"], ["--out"]),
            (["aggregat"], ["aggregat"]),
            (["info", "--jso"], ["--jso"]),
        ],
    )
    def test_bad_usage_exits_with_2(self, arguments: list[str], words: list[str]) -> None:
        refused(fastagg(*arguments), 2, *words)

    def test_real_exit_codes(self, clients: list[Path], tmp_path: Path) -> None:
        assert process("aggregate", *clients, "-m", "flora").returncode == 2
        done = process("inspect", tmp_path / "nowhere", "--json")
        assert done.returncode == 1
        assert "nowhere" in done.stderr
        assert "Traceback" not in done.stderr
        assert "nowhere" in json.loads(done.stdout)["error"]["message"]

    def test_help_and_version_do_not_import_torch(self) -> None:
        script = (
            "import sys\n"
            "from fastagg.cli.app import app\n"
            "try:\n    app(sys.argv[1:])\n"
            "except SystemExit as stop:\n    assert not stop.code\n"
            "heavy = {'torch', 'numpy', 'safetensors', 'peft', 'transformers'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        for arguments in (["--help"], ["aggregate", "--help"], ["--version"]):
            command = [sys.executable, "-c", script, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert "Usage" in done.stdout or "fastagg 0" in done.stdout

    @pytest.mark.parametrize("name", ["aggregate", "merge", "inspect", "validate", "info", "demo"])
    def test_every_option_is_documented(self, name: str) -> None:
        import typer

        group = typer.main.get_command(app)
        found = group.commands[name]  # type: ignore[attr-defined]
        assert found.help
        for parameter in found.params:
            assert parameter.help, (name, parameter.name)

    def test_an_unexpected_error_is_a_sentence_too(
        self, clients: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("wires\ncrossed")

        monkeypatch.setattr("fastagg.folders.inspection.measure", broken)
        refused(fastagg("inspect", clients[0]), 1, "wires crossed", "FASTAGG_TRACEBACK")
        monkeypatch.setenv("FASTAGG_TRACEBACK", "1")
        assert isinstance(fastagg("inspect", clients[0]).exception, RuntimeError)

    def test_a_library_that_is_not_installed_has_its_cure(
        self, clients: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(*_: object, **__: object) -> None:
            raise ModuleNotFoundError("No module named 'peft'", name="peft")

        monkeypatch.setattr("fastagg.folders.inspection.measure", missing)
        refused(fastagg("inspect", clients[0]), 1, "peft", "pip install 'fastagg[federated]'")


def poison(folder: Path) -> None:
    """One NaN into the last tensor of an adapter."""
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    state[max(state)][0, 0] = float("nan")
    save_file(state, path)


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


class TestBadInput:
    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (poison, ["'ben'", "NaN", "model.layers.1"]),
            (cut, ["'ben'", "adapter_model.safetensors"]),
            (pickled, ["'ben'", "pickle"]),
            (lambda folder: (folder / "adapter_config.json").unlink(), ["'ben'", "adapter_config"]),
            (lambda folder: (folder / "adapter_config.json").write_text("{"), ["'ben'", "JSON"]),
            (shutil.rmtree, ["'ben'", "no folder"]),
        ],
    )
    def test_it_names_the_client_and_leaves_nothing(
        self, clients: list[Path], tmp_path: Path, damage: Any, words: list[str]
    ) -> None:
        damage(clients[1])
        out = tmp_path / "out"
        refused(fastagg("aggregate", *clients, "-m", "flexlora", "-o", out), 1, *words)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["clients"]
        result = fastagg("validate", *clients, "--json")
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert [folder["valid"] for folder in found["folders"]] == [True, False, True]
        assert not found["together"]
        for word in words:
            assert word in found["folders"][1]["error"]

    def test_the_same_folder_twice(self, clients: list[Path], tmp_path: Path) -> None:
        again = clients[0].parent / "." / clients[0].name
        result = fastagg("aggregate", clients[0], again, "-m", "flora", "-o", tmp_path / "out")
        refused(result, 1, "same folder", "'anna'")

    def test_names_that_clash_take_more_of_their_path(self, tmp_path: Path) -> None:
        folders = [tmp_path / a / b for a, b in (("x", "last"), ("y", "last"), ("y", "first"))]
        named = client_folders(folders)
        assert list(named) == ["x/last", "y/last", "first"]
        assert list(named.values()) == folders


    def test_a_link_gives_the_client_its_name(self, clients: list[Path], tmp_path: Path) -> None:
        links = [tmp_path / "links" / name for name in ("x", "y", "z")]
        links[0].parent.mkdir()
        for link, folder in zip(links, clients, strict=True):
            link.symlink_to(folder)
        assert list(client_folders(links)) == ["x", "y", "z"]
        assert list(client_folders([links[0] / ".." / "anna", links[1]])) == ["anna", "y"]
        assert Adapter.load(links[0]).name == "x"
        refused(fastagg("validate", links[0], clients[0]), 1, "same folder")


class TestWeights:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ('{"anna": 1, "ben": 1}', ["'cleo'", "without a weight"]),
            ('{"anna": 1, "bem": 1, "cleo": 1}', ["'bem'", "such as 'ben'"]),
            ('{"anna": 1, "ben": -1, "cleo": 1}', ["'ben'", "-1"]),
            ('{"anna": 1, "ben": NaN, "cleo": 1}', ["'ben'", "nan"]),
            ('{"anna": 1, "ben": true, "cleo": 1}', ["'ben'", "True"]),
            ('{"anna": 1, "ben": "2", "cleo": 1}', ["'ben'", "'2'"]),
            ('{"anna": 0, "ben": 0, "cleo": 0}', ["all weights are zero"]),
            ('{"anna": 1, "anna": 2, "ben": 1, "cleo": 1}', ["'anna'", "twice"]),
            ("[1, 2]", ["expected 3", "got 2"]),
            ('{"anna": 1' + "0" * 400 + ', "ben": 1, "cleo": 1}', ["'anna'", "not a weight"]),
            ('{"anna": 1' + "0" * 5000 + ', "ben": 1, "cleo": 1}', ["not JSON", "digits"]),
            ("{", ["not JSON"]),
            ("[" * 100_000, ["not JSON"]),
            ("3", ["neither an object nor a list"]),
        ],
    )
    def test_what_is_wrong_is_said(
        self, clients: list[Path], tmp_path: Path, text: str, words: list[str]
    ) -> None:
        path = tmp_path / "w.json"
        path.write_text(text)
        out = tmp_path / "out"
        result = fastagg("aggregate", *clients, "-m", "flora", "-o", out, "--weights", path)
        refused(result, 1, *words)
        assert not out.exists()

    def test_a_file_that_is_not_there(self, clients: list[Path], tmp_path: Path) -> None:
        arguments = ("-m", "flora", "-o", tmp_path / "out", "--weights", tmp_path / "none.json")
        refused(fastagg("aggregate", *clients, *arguments), 1, "none.json", "No such file")

    def test_csv_and_lists(self, tmp_path: Path) -> None:
        path = tmp_path / "w.csv"
        path.write_text("client,weight\nben,3\n\nanna, 1.5\n")
        assert client_weights(path, ["anna", "ben"]) == {"anna": 1.5, "ben": 3.0}
        path.write_text("ben,3\nanna,one\n")
        with pytest.raises(ValueError, match="anna,one"):
            read_weights(path)
        assert client_weights([1, 2], ["anna", "ben"]) == {"anna": 1.0, "ben": 2.0}
        assert client_weights(None, ["anna"]) == {"anna": 1.0}


class TestInspect:
    def test_measures_are_those_of_the_equation(self, tmp_path: Path) -> None:
        folder = make_folder(
            tmp_path / "one", rank=6, alpha=9, use_rslora=True, rank_pattern={"v_proj": 3}, seed=5
        )
        result = fastagg("inspect", folder, "--spectrum", "--json")
        assert result.exit_code == 0, result.output
        (found,) = json.loads(result.stdout)["adapters"]
        state = load_file(folder / "adapter_model.safetensors")
        squares = 0.0
        for module in found["modules"]:
            name = f"base_model.model.{module['module']}"
            a, b = (state[f"{name}.lora_{side}.weight"].double() for side in "AB")
            rank = 3 if "v_proj" in name else 6
            assert module["rank"] == rank
            assert module["scaling"] == pytest.approx(9 / rank**0.5)
            assert tuple(module["shape"]) == MODULES[module["module"]]
            sigma = torch.linalg.svdvals(module["scaling"] * b @ a)
            assert module["norm"] == pytest.approx(sigma.norm().item(), rel=1e-6)
            squares += sigma.square().sum().item()
            spectrum = module["spectrum"]
            assert spectrum["singular_values"] == pytest.approx(
                sigma[:rank].tolist(), abs=2e-6 * sigma[0].item()
            )
            share = sigma[:rank] / sigma.sum()
            entropy = -(share * share.log()).sum()
            assert spectrum["effective_rank"] == pytest.approx(entropy.exp().item(), rel=1e-4)
            stable = sigma.square().sum() / sigma[0] ** 2
            assert spectrum["stable_rank"] == pytest.approx(stable.item(), rel=1e-5)
            assert spectrum["numerical_rank"] == rank
            energy = sigma.square().cumsum(0) / sigma.square().sum()
            expected = {str(tau): int((energy < tau).sum()) + 1 for tau in (0.9, 0.99)}
            assert spectrum["energy_ranks"] == expected
        assert found["norm"] == pytest.approx(squares**0.5, rel=1e-6)
        assert found["ranks"] == {"3": 2, "6": 2}
        assert found["dtypes"] == {"float32": 8}

    def test_zero_updates_and_nonfinite_ones_are_shown(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "zero", rank=4)
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        for key in state:
            if "lora_B" in key:
                state[key].zero_()
        state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][:2] = float("inf")
        save_file(state, path)
        result = fastagg("inspect", folder, "--spectrum", "--json")
        assert result.exit_code == 0, result.output
        (found,) = json.loads(result.stdout)["adapters"]
        first, *others = found["modules"]
        assert (first["nonfinite"], first["norm"], first["spectrum"]) == (32, None, None)
        assert found["nonfinite"] == 32
        assert all(module["norm"] == 0 for module in others)
        assert all(module["spectrum"]["numerical_rank"] == 0 for module in others)
        assert fastagg("inspect", folder, "--spectrum").exit_code == 0

    def test_a_pattern_chooses_modules(self, clients: list[Path]) -> None:
        result = fastagg("inspect", *clients, "--module", "*layers.1*q_proj", "--json")
        for item in json.loads(result.stdout)["adapters"]:
            names = [module["module"] for module in item["modules"]]
            assert names == ["model.layers.1.self_attn.q_proj"]
        shown = fastagg("inspect", clients[0], "--module", "*layers.1*q_proj")
        assert "model.layers.1.self_attn.q_proj" in shown.stdout
        assert "v_proj" not in shown.stdout
        refused(fastagg("inspect", clients[0], "--module", "k_proj"), 1, "k_proj", "'*q_proj'")

    def test_a_table_line_for_each(self, clients: list[Path]) -> None:
        shown = fastagg("inspect", *clients).stdout
        for name in RANKS:
            assert sum(name in line for line in shown.splitlines()) == 1


class TestValidate:
    def test_all_together(self, clients: list[Path]) -> None:
        result = fastagg("validate", *clients)
        assert result.exit_code == 0, result.output
        assert "can be aggregated together" in result.stdout
        assert "different ranks" in result.stdout

    def test_what_sets_a_folder_apart(self, clients: list[Path], tmp_path: Path) -> None:
        other = make_folder(tmp_path / "other", base_model="another")
        result = fastagg("validate", *clients, other, "--json")
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert not found["together"]
        assert found["folders"][3]["valid"]
        assert "another" in found["folders"][3]["conflict"]


class TestMerge:
    def test_the_stack_into_a_checkpoint(
        self, clients: list[Path], weights: Path, tmp_path: Path
    ) -> None:
        out, base, merged = tmp_path / "out", tmp_path / "base", tmp_path / "merged"
        base.mkdir()
        torch.manual_seed(0)
        state = {f"{name}.weight": torch.randn(shape) for name, shape in MODULES.items()}
        save_file(state, base / "model.safetensors")
        fastagg("aggregate", *clients, "-m", "flora", "--weights", weights, "-o", out)
        arguments = ("merge", "--base", base, "--adapter", out / "stacked", "--out", merged)
        result = fastagg(*arguments, "--json")
        assert result.exit_code == 0, result.output
        assert len(json.loads(result.stdout)["merged"]) == len(MODULES)
        found = load_file(merged / "model.safetensors")
        for name in MODULES:
            expected = state[f"{name}.weight"].double() + exact(clients, WEIGHTS, name)
            difference = found[f"{name}.weight"].double() - expected
            assert difference.abs().max() < 1e-5
        refused(fastagg(*arguments), 1, "exists", "--force")
        again = fastagg(*arguments, "--force")
        assert again.exit_code == 0, again.output
        assert "4 modules" in again.stdout

    def test_a_base_that_does_not_fit(self, clients: list[Path], tmp_path: Path) -> None:
        base = tmp_path / "base"
        base.mkdir()
        save_file({"model.layer.0.q_proj.weight": torch.zeros(24, 16)}, base / "model.safetensors")
        result = fastagg("merge", "--base", base, "--adapter", clients[0], "-o", tmp_path / "out")
        refused(result, 1, "model.layers.0.self_attn.q_proj", "model.layer.0.q_proj.weight")
        assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle(
    clients: list[Path], weights: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Stopped between two clients: a sentence, 128 + the signal's number, and nothing left."""
    script = (
        "import sys, time\n"
        "import fastagg.aggregator\n"
        "add = fastagg.aggregator.Aggregator.add\n"
        "def slow(self, update):\n"
        "    add(self, update)\n"
        "    print('added', flush=True)\n"
        "    time.sleep(60)\n"
        "fastagg.aggregator.Aggregator.add = slow\n"
        "from fastagg.cli.app import main\n"
        "main()\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, "aggregate", *map(str, clients), "-m", "flora"]
    with subprocess.Popen(
        [*command, "-o", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "added\n"
        running.send_signal(number)
        _, said = running.communicate(timeout=20)
    assert running.returncode == 128 + number
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients", "weights.json"]


def test_interrupted_while_writing(clients: list[Path], tmp_path: Path) -> None:
    """Ctrl-C between the first file and the rename."""
    script = (
        "import sys, time\n"
        "import fastagg.aggregation\n"
        "save = fastagg.aggregation.Aggregate.save\n"
        "def slow(self, folder, ranks=None, *, force=False, progress=None):\n"
        "    def wait(*_):\n"
        "        print('writing', flush=True)\n"
        "        for _ in range(600):  # a signal just before a sleep does not shorten it\n"
        "            time.sleep(0.1)\n"
        "    save(self, folder, ranks, force=force, progress=wait)\n"
        "fastagg.aggregation.Aggregate.save = slow\n"
        "from fastagg.cli.app import main\n"
        "main()\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    command = [sys.executable, "-c", script, "aggregate", *map(str, clients), "-m", "flexlora"]
    with subprocess.Popen(
        [*command, "-o", str(out), "--force"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "writing\n"
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "interrupted" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients", "out"]
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_a_closed_pipe_is_no_error(clients: list[Path]) -> None:
    command = f"{sys.executable} -m fastagg inspect {clients[0]} {clients[1]} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_the_function_behind_the_command(clients: list[Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = aggregate_folders(
        clients,
        tmp_path / "out",
        method="zeropad",
        weights=WEIGHTS,
        progress=lambda done, total, what: seen.append((done, total, what)),
        max_memory="1GiB",
    )
    assert [client.client for client in report.clients] == list(RANKS)
    assert [what for _, _, what in seen[:3]] == list(RANKS)
    assert seen[-1][0] == seen[-1][1] == len(MODULES)


def test_naming_many_folders_compares_no_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0
    real = Path.parts.fget  # type: ignore[attr-defined]

    def counted(path: Path) -> tuple[str, ...]:
        nonlocal compared
        compared += 1
        return real(path)  # type: ignore[no-any-return]

    folders = [tmp_path / str(k) / "checkpoint" for k in range(200)]
    monkeypatch.setattr("pathlib.PurePath.parts", property(counted))
    assert list(client_folders(folders)) == [f"{k}/checkpoint" for k in range(200)]
    assert compared < 20 * len(folders)
