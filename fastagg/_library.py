"""Loads the compiled libraries, and knows why where it cannot, and why where no GPU can be used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Library:
    """One compiled part: where it should be, whether it is loaded, and if not, why."""

    name: str
    path: str
    loaded: bool
    error: str | None = None


def _load(name: str) -> Library:
    path = _FOLDER / f"{name}.so"
    if not path.exists():
        return Library(name, str(path), False, "the file does not exist: fastagg was not built")
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        # Torch's own error names only the file: the loader's is its cause.
        return Library(name, str(path), False, str(error.__cause__ or error))
    return Library(name, str(path), True)


def _load_host() -> Library:
    try:
        module = importlib.import_module("fastagg._host")
    except ImportError as error:
        return Library("_host", str(_FOLDER / "_host"), False, str(error))
    return Library("_host", str(module.__file__), True)


def _load_cuda() -> Library:
    """Never asks whether there is a GPU: to load registers kernels, which costs less than a millisecond
    and makes no context, while to ask starts the driver, and no CUDA is left to a forked process then.
    """
    built = _build_info().get("cuda", "built")
    if built != "built":  # whatever file an earlier build has left there
        why = str(built)
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    elif not OPS.loaded:
        why = "_C, which has the ops' schemas, is not loaded"
    else:
        return _load("_cuda")
    return Library("_cuda", str(_FOLDER / "_cuda.so"), False, why)


def _build_info() -> dict[str, Any]:
    return dict(importlib.import_module("fastagg._host").build_info()) if HOST.loaded else {}


OPS = _load("_C")
HOST = _load_host()
CUDA = _load_cuda()


def require(library: Library) -> None:
    """Raise ImportError with everything one needs to act, where `library` is not loaded."""
    if library.loaded:
        return
    raise ImportError(
        f"fastagg's compiled library {library.name} ({library.path}) could not be loaded: "
        f"{library.error}. It needs torch >= 2.11 and runs under torch {torch.__version__} here. "
        "Reinstall with `pip install --no-build-isolation --force-reinstall --no-deps .` from the "
        "source folder; `fastagg info` prints what a bug report needs."
    )


def architectures() -> list[str]:
    """What the CUDA kernels are compiled for, as "8.0", "9.0a" or "12.0+PTX"."""
    return [name for name in str(_build_info().get("cuda_architectures", "")).split(";") if name]


def cuda_obstacle(index: int | None = None) -> str | None:
    """Why our kernels cannot run on a GPU, the current one or that of an index; None where they can."""
    if not CUDA.loaded:
        return CUDA.error
    if not torch.cuda.is_available():
        return "torch finds no GPU that it can use"
    if index is not None and index >= torch.cuda.device_count():
        return f"there is no GPU {index}: torch finds {torch.cuda.device_count()}"
    capability = torch.cuda.get_device_capability(index)
    if not any(_serves(built, capability) for built in architectures()):
        return (
            f"the kernels are compiled for {', '.join(architectures())}, and none of these runs on "
            f"{torch.cuda.get_device_name(index)} ({'{}.{}'.format(*capability)})"
        )
    return None


def _serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its own major version from its minor version on, that of 9.0a on 9.0 alone;
    PTX runs on every later GPU."""
    number, _, ptx = architecture.partition("+")
    major, minor = map(int, number.rstrip("af").split("."))
    if number.endswith("a") and not ptx:
        return capability == (major, minor)
    return capability >= (major, minor) and (bool(ptx) or capability[0] == major)


def status() -> dict[str, Any]:
    """What is loaded, from where, why not, and what it was built with."""
    return {"_C": OPS, "_host": HOST, "_cuda": CUDA, "build": _build_info()}
