"""A state, tensors and one text, as one safetensors file, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastagg.errors import InvalidInput
from fastagg.whole_file import whole_file

__all__ = ["read", "write"]


def write(file: str | os.PathLike[str], state: Mapping[str, torch.Tensor | str]) -> None:
    """Writes a state as one safetensors file: whole, or not at all; what was there is replaced.

    Texts become the file's metadata.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    texts = {name: value for name, value in state.items() if isinstance(value, str)}
    with whole_file(file) as made:
        save_file(tensors, made, metadata=texts)


def read(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what :func:`write` wrote.

    Raises:
        InvalidInput: no such file, or not a safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            return {**{name: opened.get_tensor(name) for name in names}, **(opened.metadata() or {})}
    except (OSError, SafetensorError) as error:
        raise InvalidInput(
            f"this state cannot be continued: {file}: {error}",
            field="state",
            expected="a state that FastAgg saved",
            cure="Give the file of a state, whole",
        ) from error
