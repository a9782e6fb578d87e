"""The measurement of trees, on a few clients: its figures against dense float64, and its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import tree
from fastagg.bench.workload import Module


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "CLIENTS", 8)
    fans = {"flat": (8,), "wide, 8 x 8": (4, 2), "4 x 4 x 4": (2, 4), "binary, 6 levels": (2, 2, 2)}
    monkeypatch.setattr(tree, "TREES", fans)


def test_the_figures_are_those_of_the_equation(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        "layers.0.self_attn.q_proj": Module(
            [torch.randn(rank, 24, generator=generator) for rank in (2, 4, 8, 16)] * 2,
            [torch.randn(24, rank, generator=generator) for rank in (2, 4, 8, 16)] * 2,
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
        )
    }
    ((name, module),) = modules.items()
    terms = zip(module.c, module.Bs, module.As, strict=True)
    # A client's share is its weight over the sum, times its scaling.
    exact = sum(tree.SCALING * c / sum(module.c) * B.double() @ A.double() for c, B, A in terms)
    assert isinstance(exact, torch.Tensor)
    module = Module(module.As, module.Bs, [tree.SCALING * c / sum(module.c) for c in module.c])
    result, sent, _ = tree.aggregated({name: module}, (2, 4), 12)
    handed = result.adapter(rank=16)
    found = tree.figures(result, handed, name, module)
    norm, optimum = exact.norm(), torch.linalg.svdvals(exact)[16:].norm()
    error = (exact - handed.delta(name).double()).norm()
    factors = result.factors(name)
    assert factors is not None
    lost = (exact - factors[1] @ factors[0]).norm() / norm
    assert found["excess_of_dw"] == pytest.approx(float((error - optimum) / norm), rel=1e-4, abs=1e-6)
    assert found["optimum"] == pytest.approx(float(optimum / norm), rel=1e-9)
    assert found["lost"] == pytest.approx(float(lost), rel=1e-9)
    assert 12 * 48 * 4 < sent < 12 * 48 * 4 + 5000


def test_the_record_has_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "tree.json"
    tree.main(["--size", "40", "--modules", "1", "--seeds", "1", "--record", str(record)])
    results = json.loads(record.read_text())["results"]
    assert len(results) == 3 * (1 + 3 * 5)
    assert capsys.readouterr().out.count("\n") == len(results) + 2
    for row in results:
        assert row["lost"] <= row["stated"] + 1e-12
        if row["kept"] is None:
            assert row["excess"] < 1e-4
