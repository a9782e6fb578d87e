"""The GPU measurements, tried on a CPU: what is timed beside our ops computes what they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.baselines import dense_svd, qr_core_svd
from bench.gpu.clients import Clients, gaussian
from bench.gpu.flexlora import RANK, Step, exact, randomized
from bench.gpu.reconstruction import candidates
from bench.gpu.stacking import baselines
from fastagg import ops

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def clients(seed: int) -> Clients:
    torch.manual_seed(seed)
    return gaussian((64, 3, 8, 1), 3, 96, CPU)


def test_stacking_baselines_make_the_same_stack(clients: Clients) -> None:
    shape = {"modules": 3, "rows": clients.rows, "m": 96, "n": 96, "dtype": torch.bfloat16}
    A, Bt, nonfinite, _ = ops.stack(clients.flats, clients.slots, clients.scale, **shape)
    assert not nonfinite.any()
    for name, stacked in baselines(clients).items():
        for module, (a, b) in enumerate(stacked()):
            assert torch.equal(a, A[module]), name
            assert torch.equal(b, Bt[module].mT), name


def test_reconstruction_candidates_add_the_same_update(rng: torch.Generator) -> None:
    A, Bt = (torch.randn(2, 20, 96, generator=rng).bfloat16() for _ in range(2))
    c = torch.linspace(0.5, 1.5, 10, dtype=torch.float64).repeat_interleave(2).expand(2, -1)
    W = torch.randn(2, 96, 96, generator=rng).bfloat16()
    before = W.double()
    expected = before + (Bt.double() * c[:, :, None]).mT @ A.double()
    terms = before.abs() + (Bt.double().abs() * c[:, :, None]).mT @ A.double().abs()
    for name, run in candidates(W, A, Bt, c).items():
        W.copy_(before)
        run()
        # A's entries times c, dW and the sum are rounded to bf16, where a way does not fuse them.
        assert ((W.double() - expected).abs() <= 3 * 2.0**-8 * terms).all(), name


@pytest.mark.parametrize("decompose", [exact, randomized])
def test_a_step_hands_out_what_the_baselines_find(clients: Clients, decompose: object) -> None:
    step = Step(clients, decompose)  # type: ignore[arg-type]
    step.all()
    for module in range(clients.modules):
        As, Bs = clients.factors(module)
        parts = zip(clients.weights, As, Bs, strict=True)
        update = sum(w * B.double() @ A.double() for w, A, B in parts)
        sigma = torch.linalg.svdvals(update)
        for baseline in (dense_svd, qr_core_svd):
            left, right = baseline(As, Bs, clients.weights, RANK)
            error = (left.double() @ right.double() - update).norm()
            assert error <= sigma[RANK:].norm() + 1e-5 * sigma.norm(), baseline.__name__
        # The first client's next factors, at its own rank, with its scaling of 2.
        a, b = step.next[0].view(torch.bfloat16).view(clients.modules, 2, 64 * 96)[module].double()
        found = 2 * b.view(96, 64) @ a.view(64, 96)
        assert (found - update).norm() <= sigma[64:].norm() + 0.01 * sigma.norm()


def test_every_case_runs_and_leaves_a_record(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.run", "--device", "cpu", "--record", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = {path.stem.partition("-")[0] for path in tmp_path.glob("*.json")}
    assert names == {"ceilings", "stack", "reconstruct", "exact", "randomized", "hostile"}
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["machine"]["build"]["version"]
        assert record["results"][0]["rows"]
