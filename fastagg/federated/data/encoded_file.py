"""Encoded examples in files: the clients of a simulation cost disk, not memory.

A client's file holds three tensors for each part ("train", "held_out"): all tokens one after another
(int32), where each example ends among them, and how many of its tokens are prompt (int64).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastagg.federated.data.prompt import IGNORED, Encoded
from fastagg.whole_file import whole_file

__all__ = ["EncodedExamples", "read_encoded", "write_encoded"]


class EncodedExamples(Sequence[Encoded]):
    """Examples that are made from their tokens when they are asked for."""

    def __init__(self, tokens: Tensor, ends: Tensor, prompts: Tensor) -> None:
        self._tokens = tokens
        self._ends = ends
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        begin = int(self._ends[place - 1]) if place else 0
        ids = self._tokens[begin : int(self._ends[place])].to(torch.int64)
        labels = ids.clone()
        labels[: int(self._prompts[place])] = IGNORED
        return Encoded(ids, labels)


def write_encoded(path: Path, parts: Mapping[str, Iterable[Encoded]]) -> None:
    """Writes a client's examples, whole or not at all; what was there is replaced.

    Args:
        parts: name -> examples whose labels are ``IGNORED`` on the prompt and the tokens behind it.
    """
    tensors = {}
    for part, examples in parts.items():
        own = list(examples)
        ends = itertools.accumulate(len(each.input_ids) for each in own)
        prompts = [int((each.labels == IGNORED).sum()) for each in own]
        ids = [each.input_ids for each in own]
        tensors[f"{part}.tokens"] = torch.cat(ids or [torch.empty(0)]).to(torch.int32)
        tensors[f"{part}.ends"] = torch.tensor(list(ends), dtype=torch.int64)
        tensors[f"{part}.prompts"] = torch.tensor(prompts, dtype=torch.int64)
    with whole_file(path) as made:
        save_file(tensors, made)


def read_encoded(path: Path, part: str) -> EncodedExamples:
    """One part of what :func:`write_encoded` wrote, mapped: read when an example is."""
    with safe_open(path, framework="pt") as file:
        names = (f"{part}.{name}" for name in ("tokens", "ends", "prompts"))
        return EncodedExamples(*map(file.get_tensor, names))
