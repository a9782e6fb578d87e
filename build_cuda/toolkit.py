"""nvcc, and the architectures that it compiles for.

CUDA_HOME             where the toolkit is; else it is looked for in PATH and in /usr/local/cuda.
TORCH_CUDA_ARCH_LIST  architectures as torch takes them: "8.0;9.0a;12.0+PTX".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch

WHEEL = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]
WITHOUT_GPU = ["8.0", "9.0a"]
# Asynchronous copies and the bf16 and fp64 matrix instructions begin here.
OLDEST_ARCHITECTURE = (8, 0)
# The first whose 9.0a is complete and that launches by cudaLaunchKernelEx.
OLDEST_NVCC = (12, 0)


class LeftOut(Exception):
    """Why the CUDA kernels, or some of their architectures, cannot be built."""


@dataclass(frozen=True)
class Toolkit:
    """A compiler with the architectures to compile for, and why others of them are left out."""

    nvcc: str
    version: str
    architectures: list[str]
    left_out: list[str]

    def gencode(self) -> list[str]:
        """nvcc's flags for machine code, and for PTX, which later GPUs translate for themselves."""
        flags = []
        for architecture in self.architectures:
            code = architecture.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
            if architecture.endswith("+PTX"):
                # What 9.0a has beyond 9.0 no later GPU has: its own PTX would run nowhere else.
                base = code.rstrip("af")
                flags.append(f"-gencode=arch=compute_{base},code=compute_{base}")
        return flags


def find_toolkit(local: bool) -> Toolkit:
    """The toolkit for a build that stays on this machine (`local`), or for a wheel.

    Raises:
        LeftOut: there is none, it is too old, or it knows none of the architectures.
    """
    nvcc = _nvcc()
    version = _version(nvcc)
    if tuple(map(int, version.split(".")[:2])) < OLDEST_NVCC:
        raise LeftOut(f"nvcc {version} is older than {'.'.join(map(str, OLDEST_NVCC))}")
    known = set(re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch")))
    chosen, left_out = [], []
    for architecture in _requested(local):
        number = re.match(r"(\d+)\.(\d)[af]?(\+PTX)?$", architecture)
        if number is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected the like of 8.0;9.0a+PTX, got {architecture!r}")
        if (int(number[1]), int(number[2])) < OLDEST_ARCHITECTURE:
            left_out.append(f"{architecture} (the kernels need 8.0 or later)")
        elif number[1] + number[2] not in known:
            left_out.append(f"{architecture} (nvcc {version} does not know it)")
        else:
            chosen.append(architecture)
    if not chosen:
        raise LeftOut(f"no architecture remains without {', '.join(left_out)}")
    return Toolkit(nvcc, version, chosen, left_out)


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    if home is not None:
        places = [os.path.join(home, "bin")]
    else:
        places = [*os.get_exec_path(), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    if found is None:
        raise LeftOut("nvcc was not found" + (f" in CUDA_HOME={home}" if home is not None else ""))
    return found


def _version(nvcc: str) -> str:
    release = re.search(r"release .*, V([\d.]+)", _output(nvcc, "--version"))
    if release is None:
        raise LeftOut(f"{nvcc} --version tells no release")
    return release[1]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise LeftOut(f"nvcc does not run: {error}") from error


def _requested(local: bool) -> list[str]:
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; \t\n"))
    if listed != [""]:
        return list(dict.fromkeys(listed))
    if not local:
        return WHEEL
    at_hand = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    # The matrix instructions of Hopper are in 9.0a alone.
    names = ["9.0a" if found == (9, 0) else "{}.{}".format(*found) for found in sorted(at_hand)]
    return names or WITHOUT_GPU
