"""Builds fastagg/_C (schemas and CPU kernels, LibTorch stable ABI), fastagg/_cuda (CUDA kernels, the
same ABI) and fastagg/_host (pybind11).

FASTAGG_CUDA=auto|0|1  CUDA kernels: where nvcc is found, never, or required.
MAX_JOBS               compilers run at a time.

build_cuda/ tells what else the CUDA kernels' build reads from the environment.
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
sys.path.insert(0, str(ROOT))

from build_cuda.library import build_library  # noqa: E402
from build_cuda.toolkit import LeftOut, Toolkit, find_toolkit  # noqa: E402

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


def cuda_toolkit(local: bool) -> Toolkit:
    """What FASTAGG_CUDA asks for; ends the build where that cannot be had.

    Raises:
        LeftOut: the CUDA kernels are to be left out.
    """
    wanted = os.environ.get("FASTAGG_CUDA", "auto")
    if wanted not in {"auto", "0", "1"}:
        sys.exit(f"FASTAGG_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        raise LeftOut("FASTAGG_CUDA=0")
    try:
        toolkit = find_toolkit(local)
    except LeftOut as reason:
        if wanted == "1":
            sys.exit(f"FASTAGG_CUDA=1 requires the CUDA kernels, but {reason}")
        print(f"fastagg: CUDA kernels left out: {reason}", flush=True)
        raise
    if toolkit.left_out:
        missing = ", ".join(toolkit.left_out)
        if wanted == "1":
            sys.exit(f"FASTAGG_CUDA=1 requires all architectures, but these are left out: {missing}")
        print(f"fastagg: CUDA architectures left out: {missing}", flush=True)
    return toolkit


class Build(BuildExtension):
    """BuildExtension, with the libraries of ops named without a Python tag (they are no Python modules)
    and the CUDA kernels built without torch's help, which it refuses where it has no CUDA itself."""

    def run(self) -> None:
        try:
            self.toolkit = cuda_toolkit(local=bool(self.inplace))
            built = {
                "CUDA": "built",
                "CUDA_ARCHITECTURES": ";".join(self.toolkit.architectures),
                "NVCC_VERSION": self.toolkit.version,
            }
        except LeftOut as reason:
            built = {
                "CUDA": f"left out of the build: {reason}",
                "CUDA_ARCHITECTURES": "",
                "NVCC_VERSION": "",
            }
            self.extensions = [made for made in self.extensions if made.name != "fastagg._cuda"]
        host = next(made for made in self.extensions if made.name == "fastagg._host")
        host.extra_compile_args += [f'-DFASTAGG_{name}="{value}"' for name, value in built.items()]
        super().run()

    def build_extension(self, extension: Extension) -> None:
        if extension.name != "fastagg._cuda":
            super().build_extension(extension)
            return
        library = build_library(
            self.toolkit,
            kernels=[ROOT / name for name in sources("cuda", suffix=".cu")],
            ops=[ROOT / name for name in extension.sources],
            ops_flags=[*CXX, *STABLE_ABI],
            # Not setuptools' folder for objects: that is a new one in every editable installation.
            folder=ROOT / "build" / "cuda",
        )
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] in {"_C", "_cuda"}:
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
    cuda = Extension(
        "fastagg._cuda",
        sources("ops/cuda"),
        depends=[*headers(), *sources("cuda", suffix=".cu")],
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
        ],
        depends=headers(),
    )
    return [library, cuda, host]


setup(version=VERSION, ext_modules=extensions(), cmdclass={"build_ext": Build})
