"""Reads the Natural Instructions clients that lie beside the checkout, where they do.

``../shared/data`` from the repository's root, or the folder that ``FASTAGG_DATA`` names.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Task:
    """One client: its texts and its number of training examples, the weight it counts with."""

    client: str
    train: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def weight(self) -> int:
        return len(self.train)


def folder() -> Path:
    """The folder of the clients' files; skips the test where it is absent."""
    found = Path(os.environ.get("FASTAGG_DATA", _BESIDE)) / "natural_instructions"
    if not found.is_dir():
        pytest.skip(
            f"no training texts at {found}: set FASTAGG_DATA to a folder with natural_instructions/"
        )
    return found


def read(client: str) -> Task:
    """The task of one client, such as ``"0019"``."""
    return Task(client, _texts(client, "train"), _texts(client, "test"))


def _texts(client: str, split: str) -> tuple[str, ...]:
    lines = (folder() / f"client_{client}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [json.loads(line) for line in lines]
    return tuple(f"{e['instruction']}\n{e['input']}\n{e['output']}\n" for e in examples if e["output"])
