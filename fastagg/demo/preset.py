"""What the demo runs, as settings of `fastagg simulate`: all of it, and what its tests take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastagg.federated.simulation.config import RunConfig

METHODS = ("flora", "flexlora", "zeropad", "hetlora")

# On the CPU wherever it runs, so that a machine's GPU changes nothing of what is shown.
_DEVICE = {"device": "cpu"}

# FLoRA's ten clients. Their ranks sum to 160, below the model's width of 192, so that dW has room to be
# of a higher rank than any client's adapter.
FULL: dict[str, Any] = {
    "model": {**_DEVICE, "embedded": {"steps": 200}},
    "data": {"clients": 10, "length": 160},
    "ranks": {"scheme": "flora"},
    "training": {"epochs": 0, "steps": 4, "batch": 8, "learning_rate": 3e-3},
}

_SMALL = {"hidden": 48, "feed_forward": 64, "layers": 2, "heads": 4}
QUICK: dict[str, Any] = {
    "model": {**_DEVICE, "embedded": {**_SMALL, "steps": 60, "batch": 16, "learning_rate": 1e-2}},
    "data": {"clients": 3, "length": 64},
    "ranks": {"scheme": "each", "each": [12, 6, 3]},
    "training": {"epochs": 0, "steps": 8, "batch": 8, "learning_rate": 3e-3},
}


def preset(out: Path, *, seed: int = 0, quick: bool = False) -> RunConfig:
    """The demo's configuration; ``quick`` makes no claim to sound training."""
    return RunConfig.of(
        {
            **(QUICK if quick else FULL),
            "seed": seed,
            "lora": {"targets": ["all-linear"], "alpha_over_rank": 2.0},
            "federation": {"methods": METHODS, "rounds": 2},
            "output": {"folder": str(out), "keep": "all"},
        }
    )
