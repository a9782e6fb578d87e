"""The smallest run that has all parts: three clients of unequal ranks, a model of a few weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from simulated_runs import RANKS


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    records = [
        {"instruction": f"Repeat {i % 5}", "output": f"{i % 5}" * 4, "label": "abc"[i % 3]}
        for i in range(18)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    small = {"hidden": 16, "feed_forward": 24, "layers": 1, "heads": 2, "steps": 2, "batch": 2}
    return {
        "seed": 3,
        "model": {"device": "cpu", "embedded": small},
        "data": {
            "source": "jsonl",
            "path": str(data),
            "partition": "label",
            "columns": {"input": "", "label": "label"},
            "prompt": "plain",
            "length": 24,
            "held_out": 0.34,
        },
        "ranks": {"scheme": "each", "each": list(RANKS)},
        "training": {"batch": 2, "learning_rate": 0.02},
        "federation": {"rounds": 3},
        "output": {"folder": str(tmp_path / "run"), "keep": "all"},
    }
