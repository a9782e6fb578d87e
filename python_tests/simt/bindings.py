"""torch.ops.fastagg_simt: every op on CUDA, bindings and kernels, for CPU tensors, run by the shim."""

from __future__ import annotations

import ctypes
from functools import cache

from simt.build import CSRC, SHIM, load


@cache
def load_bindings() -> ctypes.CDLL:
    return load(
        "fastagg_simt",
        sorted((CSRC / "cuda").glob("*.cu")),
        bindings=[SHIM / "bindings.cpp", CSRC / "ops" / "cuda" / "reconstruct_route.cpp"],
    )
