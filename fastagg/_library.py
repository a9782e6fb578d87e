"""Loads the compiled libraries, and knows why where it cannot."""

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


def _load_ops() -> Library:
    path = _FOLDER / "_C.so"
    if not path.exists():
        return Library("_C", str(path), False, "the file does not exist: fastagg was not built")
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return Library("_C", str(path), False, str(error))
    return Library("_C", str(path), True)


def _load_host() -> Library:
    try:
        module = importlib.import_module("fastagg._host")
    except ImportError as error:
        return Library("_host", str(_FOLDER / "_host"), False, str(error))
    return Library("_host", str(module.__file__), True)


OPS = _load_ops()
HOST = _load_host()


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


def status() -> dict[str, Any]:
    """What is loaded, from where, why not, and what it was built with."""
    build: dict[str, Any] = {}
    if HOST.loaded:
        build = dict(importlib.import_module("fastagg._host").build_info())
    cuda = str(build.get("cuda", "unknown"))
    return {
        "_C": OPS,
        "_host": HOST,
        "_cuda": Library("_cuda", str(_FOLDER / "_cuda.so"), False, cuda),
        "build": build,
    }
