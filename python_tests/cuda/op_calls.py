"""Calls of the ops by name, each with arguments in memory of its own."""

from __future__ import annotations

from typing import Any

from on_device import moved
from op_samples import MUTATED, Sample
from torch import Tensor


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def results(name: str, call: Sample, returned: Any) -> list[Tensor]:
    """What an op returned, and what it changed."""
    return tensors_of(returned) + tensors_of(call[: MUTATED.get(name, 0)])


def called(ops: Any, name: str, sample: Sample, device: str) -> list[Tensor]:
    """The results of one call with every tensor on the device, on the CPU."""
    call = moved(sample, device)
    return [tensor.cpu() for tensor in results(name, call, getattr(ops, name)(*call))]
