"""The environment report behind `fastagg info`: what a bug report needs, gathered without failing.

Every part is read on its own: where the compiled libraries do not load, or torch itself does not,
the report says so in the place of what they would have told.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "peft",
    "transformers",
    "flwr",
    "nvflare",
    "typer",
    "rich",
)
# The dispatch keys a kernel of ours may be registered under, in the order of the table.
BACKENDS = ("CPU", "CUDA", "Meta", "ADInplaceOrView")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "FASTAGG_CUDA",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TORCH_CUDA_ARCH_LIST",
)


def environment() -> dict[str, Any]:
    """Everything about the installation that a bug report needs, as a JSON-able dictionary.

    Keys: `fastagg`, `python`, `platform`, `packages`, `variables`, `cpu`, `torch`, `gpus`, `cuda`,
    `libraries`, `ops`. A part that could not be read is `{"error": why}`. Never raises.
    """
    return {
        "fastagg": version("fastagg"),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": sys.executable,
        },
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "cpu": _read(_cpu),
        "torch": _read(_torch),
        "gpus": _read(_gpus),
        "cuda": _read(_cuda),
        "libraries": _read(_libraries),
        "ops": _read(_kernels),
    }


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed; imports nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # the report must come out whatever is broken
        return {"error": f"{type(error).__name__}: {error}"}


def _cpu() -> dict[str, Any]:
    return {
        "model": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory": _memory(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory() -> int | None:
    """Bytes of physical memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "path": str(Path(torch.__file__).parent),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": bool(torch._C.has_mkl),
        "mkldnn": bool(torch._C._has_mkldnn),
        "lapack": bool(torch._C.has_lapack),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "architectures": torch.cuda.get_arch_list(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    from fastagg import _library

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
                "obstacle": _library.cuda_obstacle(index),
            }
        )
    return found


def _cuda() -> dict[str, Any]:
    """Whether our CUDA kernels can run on torch's current GPU."""
    from fastagg import _library

    obstacle = _library.cuda_obstacle()
    return {"usable": obstacle is None, "why_not": obstacle}


def _libraries() -> dict[str, Any]:
    from fastagg import _library

    return {
        name: dataclasses.asdict(found) if isinstance(found, _library.Library) else found
        for name, found in _library.status().items()
    }


def _kernels() -> dict[str, dict[str, bool]]:
    """op -> dispatch key -> whether a kernel is registered there; {} without the library."""
    import torch

    from fastagg import _library

    _read(lambda: importlib.import_module("fastagg.ops"))  # registers what can be loaded
    prefix = "fastagg::"
    known = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    registered = {name.removeprefix(prefix) for name in known if name.startswith(prefix)}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    # Without the library what is registered for CUDA only refuses.
    absent = set() if _library.CUDA.loaded else {"CUDA"}
    return {
        op: {key: key not in absent and has_kernel(prefix + op, key) for key in BACKENDS}
        for op in sorted(registered)
    }
