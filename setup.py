"""Builds fastagg/_C (schemas and CPU kernels, LibTorch stable ABI) and fastagg/_host (pybind11).

FASTAGG_CUDA=auto|0|1  CUDA kernels: where nvcc is found, never, or required.
MAX_JOBS               compilers run at a time.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"

# The oldest torch whose stable ABI the library is written against; it runs on that one and every
# later one, whichever it was built with.
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX = ["-O3", "-g0", "-fvisibility=hidden", "-Wall"]


def sources(*folders: str, suffix: str = ".cpp") -> list[str]:
    """Relative paths: an absolute one would be refused in a source distribution."""
    found = [path for folder in folders for path in (ROOT / "csrc" / folder).glob(f"*{suffix}")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def headers() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))


def cuda_build() -> str:
    """What is said of CUDA in `fastagg info`; refuses where it is required and cannot be had."""
    wanted = os.environ.get("FASTAGG_CUDA", "auto")
    if wanted not in {"auto", "0", "1"}:
        sys.exit(f"FASTAGG_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "left out: FASTAGG_CUDA=0"
    if not sources("cuda", suffix=".cu"):
        reason = "this version has CPU kernels only"
    elif not shutil.which("nvcc"):
        reason = "nvcc was not found"
    else:
        reason = "no CUDA build for this version"
    if wanted == "1":
        sys.exit(f"FASTAGG_CUDA=1 requires the CUDA kernels, but {reason}")
    print(f"fastagg: CUDA kernels left out: {reason}")
    return f"left out: {reason}"


class Build(BuildExtension):
    """BuildExtension, with `_C` named without a Python tag: it is no Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == "_C":
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)


def extensions() -> list[Extension]:
    library = CppExtension(
        "fastagg._C",
        sources("ops", "cpu"),
        extra_compile_args=[*CXX, *STABLE_ABI],
        depends=headers(),
        py_limited_api=True,
    )
    host = Extension(
        "fastagg._host",
        sources("host"),
        include_dirs=[pybind11.get_include()],
        language="c++",
        extra_compile_args=[
            *CXX,
            f'-DFASTAGG_VERSION="{VERSION}"',
            f'-DFASTAGG_TORCH_VERSION="{torch.__version__}"',
            f'-DFASTAGG_CUDA_BUILD="{cuda_build()}"',
        ],
        depends=headers(),
    )
    return [library, host]


setup(version=VERSION, ext_modules=extensions(), cmdclass={"build_ext": Build})
