"""The demo's quick mode from end to end, its figures recomputed from the folders it left."""

from __future__ import annotations

import hashlib
import io
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from fastagg import FastAggError  # noqa: E402
from fastagg.demo.outcome import MethodOutcome, Outcome  # noqa: E402
from fastagg.demo.run import run_demo  # noqa: E402
from fastagg.demo.settings import FULL, METHODS, QUICK  # noqa: E402
from fastagg.federated.data import corpus  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Matrices = dict[str, np.ndarray]

FLOAT32_ROUNDING = 3e-7


class Run:
    def __init__(self, folder: Path) -> None:
        text = io.StringIO()
        self.folder = folder
        console = Console(file=text, width=120)
        self.outcome: Outcome = run_demo(folder, quick=True, console=console)
        self.printed = text.getvalue()

    def method(self, name: str) -> MethodOutcome:
        (found,) = (m for m in self.outcome.methods if m.method == name)
        return found


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


def exact(run: Run) -> Matrices:
    weights = json.loads((run.folder / "weights.json").read_text())
    clients = {name: deltas(run.folder / "clients" / name) for name in weights}
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


def test_distances_are_those_of_the_folders(run: Run) -> None:
    expected = exact(run)
    for method in run.outcome.methods:
        for hand_out in method.hand_outs:
            again = distance(deltas(Path(hand_out.folder)), expected)
            assert hand_out.distance == pytest.approx(again, rel=1e-6, abs=1e-9)
            best = distance(truncated(expected, hand_out.rank), expected)
            assert hand_out.optimum == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_flora_is_exact_and_the_stack_goes_to_everyone(run: Run) -> None:
    (stack,) = run.method("flora").hand_outs
    assert stack.stacked
    assert stack.rank == sum(QUICK.ranks)
    assert set(stack.clients) == {c.name for c in run.outcome.clients}
    assert stack.distance <= FLOAT32_ROUNDING
    assert stack.loss == pytest.approx(run.outcome.loss_exact, abs=1e-5)


def test_flexlora_is_the_best_at_each_rank_and_padding_is_not(run: Run) -> None:
    flexlora, zeropad = run.method("flexlora"), run.method("zeropad")
    assert [h.rank for h in flexlora.hand_outs] == sorted(set(QUICK.ranks), reverse=True)
    for best, padded in zip(flexlora.hand_outs, zeropad.hand_outs, strict=True):
        assert best.distance - best.optimum <= FLOAT32_ROUNDING
        assert padded.rank == best.rank
        assert padded.distance > best.distance + 0.05
        assert padded.nbytes == best.nbytes


def test_every_client_receives_the_rank_it_trained(run: Run) -> None:
    for name in ("flexlora", "zeropad", "hetlora"):
        received = {
            client: hand_out.rank
            for hand_out in run.method(name).hand_outs
            for client in hand_out.clients
        }
        assert received == {c.name: c.rank for c in run.outcome.clients}


def test_fedit_refuses_and_says_why(run: Run) -> None:
    fedit = run.method("fedit")
    assert not fedit.hand_outs
    assert fedit.refused is not None
    assert "zeropad" in fedit.refused
    assert "fedit refused" in run.printed


def test_loss_is_that_of_the_merged_checkpoint(run: Run) -> None:
    import torch

    merged = transformers.LlamaForCausalLM.from_pretrained(run.folder / "flora" / "merged")
    texts = corpus.client_texts(
        len(QUICK.ranks), length=QUICK.length, windows=QUICK.held_out_windows, seed=0
    )
    windows = torch.cat([text.held_out for text in texts])
    with torch.no_grad():
        loss = merged(input_ids=windows, labels=windows).loss
    (stack,) = run.method("flora").hand_outs
    assert stack.loss == pytest.approx(float(loss), abs=1e-5)
    assert run.outcome.loss_before - stack.loss > 1e-3


def test_folders_are_left_to_inspect_and_figures_printed(run: Run) -> None:
    from peft import PeftModel

    base = transformers.LlamaForCausalLM.from_pretrained(run.folder / "base")
    for client in run.outcome.clients:
        assert client.own_after < client.own_before
        PeftModel.from_pretrained(base, client.folder).unload()
    saved = json.loads((run.folder / "demo.json").read_text())
    assert [m["method"] for m in saved["methods"]] == list(METHODS)
    for hand_out in run.method("flexlora").hand_outs:
        file = Path(hand_out.folder) / "adapter_model.safetensors"
        assert hand_out.nbytes == file.stat().st_size
        assert f"{hand_out.nbytes:,}" in run.printed
        assert f"{hand_out.loss:.4f}" in run.printed
    assert str(run.folder) in run.printed


def test_same_seed_same_adapters_and_an_earlier_demo_is_replaced(run: Run, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = sorted(folder.rglob("*.safetensors"))
        return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    (tmp_path / "demo.json").write_text("{}")
    (tmp_path / "clients" / "gone").mkdir(parents=True)
    (tmp_path / "clients" / "gone" / "adapter_model.safetensors").write_bytes(b"stale")
    again = Run(tmp_path)
    assert digests(again.folder) == digests(run.folder)
    assert again.outcome.loss_exact == run.outcome.loss_exact


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FastAggError, match="--out"):
        run_demo(tmp_path, quick=True, console=Console(file=io.StringIO()))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_ctrl_c_ends_it_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastagg", "demo", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        text = first + process.stdout.read()
    assert process.returncode == 130, text
    assert "Interrupted" in text
    assert "Traceback" not in text


def test_corpus_is_ten_packages_whose_held_out_text_is_not_trained_on() -> None:
    texts = corpus.client_texts(
        len(FULL.ranks), length=FULL.length, windows=FULL.held_out_windows, seed=0
    )
    assert len({text.name for text in texts}) == 10
    for text in texts:
        assert text.held_out.shape == (FULL.held_out_windows, FULL.length)
        train = set(bytes(text.train.tolist()).split(b"\0"))
        for document in bytes(text.held_out.flatten().tolist()).split(b"\0")[1:-1]:
            assert document not in train
    assert len(corpus.language_reference()) > 300_000
