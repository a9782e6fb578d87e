"""The example app in Flower itself: its simulation, and a SuperLink with SuperNodes. What the clients
got is compared with the SVD, in float64, of what they sent."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")
pytest.importorskip("ray")
pytest.importorskip("transformers")

from flower_processes import Flower, flower, free_port

pytestmark = pytest.mark.engine

RANKS = (2, 4, 8, 16)
MODULES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in (
    "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]


def factors(folder: Path, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and the scaling of a folder that PEFT would load, read without FastAgg."""
    state = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    a = state[f"base_model.model.{module}.lora_A.weight"].double()
    b = state[f"base_model.model.{module}.lora_B.weight"].double()
    assert not config["use_rslora"] and config["r"] == a.shape[0] == b.shape[1]
    return a, b, config["lora_alpha"] / config["r"]


def delta(folder: Path, module: str) -> torch.Tensor:
    a, b, scaling = factors(folder, module)
    return scaling * b @ a


def assert_optimal(kept: Path, round: int, got: str, room: float) -> None:
    """What every client got after a round is as near to dW as its rank allows.

    Args:
        got: the client's folder of what it got;  room: what its dtype's rounding may add, over |dW|.
    """
    weights = [8 * (number + 1) for number in range(len(RANKS))]
    sent = [kept / f"client-{number}" / f"round-{round}" / "sent" for number in range(len(RANKS))]
    for module in MODULES:
        parts = [w * delta(folder, module) for w, folder in zip(weights, sent, strict=True)]
        dw = torch.stack(parts).sum(0) / sum(weights)
        spectrum = torch.linalg.svdvals(dw)
        for number, rank in enumerate(RANKS):
            handed = kept / f"client-{number}" / got
            assert factors(handed, module)[0].shape[0] == rank
            best = spectrum[rank:].norm()
            # Else any rank would do.
            assert best > 1e-3 * dw.norm() or rank == RANKS[-1]
            assert (delta(handed, module) - dw).norm() <= best + room * dw.norm()


def losses(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"'loss': '([^']+)'", printed)]


def config(**settings: Any) -> str:
    return " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in settings.items())


def test_the_simulation_hands_every_client_the_optimum_at_its_rank(tmp_path: Path) -> None:
    with flower(tmp_path / "flower") as place:
        kept, folder = tmp_path / "kept", tmp_path / "rounds"
        printed = place.run(
            "--stream",
            "--federation-config",
            "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2",
            "--run-config",
            config(num_server_rounds=2, dtype="float32", keep=str(kept), folder=str(folder)),
            timeout=400,
        )
        assert sorted(path.name for path in folder.iterdir()) == ["round-0001", "round-0002"], (
            place.told(printed)
        )
        assert_optimal(kept, 1, "round-1/evaluated", 2e-6)
        assert_optimal(kept, 1, "round-2/got", 2e-6)
        assert_optimal(kept, 2, "round-2/evaluated", 2e-6)
        before, after = losses(printed)
        assert after < before
        # `flwr run` leaves its SuperLink running, and that one nothing else.
        place.superlink().terminate()
        assert place.is_empty_within(30), place.processes()


def loopback(place: Flower) -> None:
    """A SuperLink and four SuperNodes; the app's clients take their numbers from the SuperNodes."""
    port = str(free_port())
    address = f"127.0.0.1:{port}"
    (place.home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n'
        f'[superlink.loopback]\naddress = "{address}"\ninsecure = true\n'
    )
    place.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port)
    wait_for(place, "Uvicorn running")
    for number in range(len(RANKS)):
        place.start(
            "flower-supernode",
            "--insecure",
            *("--superlink", address),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", f"partition-id={number}"),
        )


def wait_for(place: Flower, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in place.logs[-1].read_text():
        assert time.monotonic() < deadline, place.told("")
        time.sleep(0.1)


def test_supernodes_get_the_optimum_at_their_ranks(tmp_path: Path) -> None:
    with flower(tmp_path / "flower") as place:
        loopback(place)
        kept = tmp_path / "kept"
        printed = place.run(
            "loopback",
            "--stream",
            "--run-config",
            config(num_server_rounds=1, keep=str(kept)),
            timeout=400,
        )
        assert "took 4 answers in, 0 failures" in printed, place.told(printed)
        # bfloat16: both factors are rounded by up to 2^-9 of each of their numbers.
        assert_optimal(kept, 1, "round-1/evaluated", 2**-7)
    assert not place.processes()
