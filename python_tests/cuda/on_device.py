"""fastagg.ops on a GPU, or on the SIMT shim where there is none, for tests that hold CPU tensors.

Every function takes what fastagg.ops's takes, all on the CPU. On a GPU its tensors are moved there, with
their strides and their storage's alignment; results and what was written to come back. The tables stay
on the CPU, where they are checked.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simt.bindings import load_bindings
from torch import Tensor

import fastagg.ops
from fastagg import _library

TABLES = {"spans", "slots", "scale", "owners", "streams", "scalings"}
WRITTEN = {"stack_": ("A", "Bt"), "reconstruct_": ("base",), "redistribute_": ("flats",)}


@functools.cache
def on_gpu() -> bool:
    """Whether these tests run on a GPU; else they run on the shim. A GPU is not passed over silently."""
    if not torch.cuda.is_available():
        return False
    obstacle = _library.cuda_obstacle()
    if obstacle is not None:
        raise pytest.UsageError(f"there is a GPU, but FastAgg cannot use it: {obstacle}")
    return True


needs_gpu = pytest.mark.skipif(not on_gpu(), reason="needs a GPU")
needs_shim = pytest.mark.skipif(on_gpu(), reason="is about the shim")


def namespace() -> Any:
    """The ops themselves, of torch.ops."""
    if on_gpu():
        return torch.ops.fastagg
    load_bindings()
    return torch.ops.fastagg_simt


def moved(value: Any, device: torch.device | str = "cuda") -> Any:
    """Tensors (in lists) on a device, the whole storage with them: a view stays the view it was."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8, device=device)
    storage.untyped_storage().copy_(value.untyped_storage())
    view = torch.empty(0, dtype=value.dtype, device=device)
    view.set_(storage.untyped_storage(), value.storage_offset(), value.shape, value.stride())
    return view.requires_grad_(value.requires_grad)


def _bring_back(values: Any, there: Any) -> None:
    pairs = zip(values, there, strict=True) if isinstance(values, list) else [(values, there)]
    for tensor, copy in pairs:
        tensor.untyped_storage().copy_(copy.untyped_storage())


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else type(value)(_cpu(item) for item in value)


def _call(name: str, *args: Any, **kwargs: Any) -> Any:
    op = getattr(fastagg.ops, name)
    if not on_gpu():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fastagg.ops, "_ops", namespace())
            return op(*args, **kwargs)
    given = inspect.signature(op).bind(*args, **kwargs).arguments
    there = {key: value if key in TABLES else moved(value) for key, value in given.items()}
    try:
        result = op(**there)
    finally:
        for key in WRITTEN.get(name, ()):
            _bring_back(given[key], there[key])
    return None if result is None else _cpu(result)


class OnDevice:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        value = getattr(fastagg.ops, name)
        return functools.partial(_call, name) if inspect.isfunction(value) else value


ops: Any = OnDevice()
