"""Runs of the ``settings`` that conftest.py has, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.run_folder import RunFolder

RANKS = (4, 2, 1)
TIMES = ("seconds", "train_seconds")


def configured(settings: dict[str, Any], **options: object) -> RunConfig:
    return RunConfig.of(
        settings, {name.replace("__", "."): str(value) for name, value in options.items()}
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    found = RunFolder(folder).metrics()
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def tensors(folder: Path) -> dict[str, bytes]:
    return {
        f"{path.relative_to(folder)}:{name}": tensor.numpy().tobytes()
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_runs(one: Path, two: Path) -> None:
    assert lines(one) == lines(two)
    assert tensors(one).keys()
    assert tensors(one) == tensors(two)
