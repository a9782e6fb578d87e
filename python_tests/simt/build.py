"""Builds CUDA kernels with the C++ compiler and the SIMT shim, and runs them on the CPU.

FASTAGG_SIMT_SANITIZE=1 builds them with AddressSanitizer and UBSan; the process must then have been
started with their runtime preloaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SHIM = ROOT / "python_tests" / "csrc" / "simt"
OBJECTS = ROOT / "build" / "simt"

FLAGS = [
    *["-std=c++17", "-O1", "-g1", "-fPIC", "-x", "c++", "-DFASTAGG_SIMT", f"-I{SHIM}", f"-I{CSRC}"],
    # Products and sums as they are written: an FMA where the source says so, as on the device.
    *["-ffp-contract=off", "-Wall", "-Wextra", "-Werror"],
    *["-Wno-unknown-pragmas", "-Wno-unused-parameter"],
]
TORCH = Path(torch.__file__).parent
TORCH_FLAGS = [
    *["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"],
    # A system folder, whose headers are not held to our warnings.
    *["-isystem", str(TORCH / "include"), "-Wno-attributes"],
]
TORCH_LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
SANITIZED = os.environ.get("FASTAGG_SIMT_SANITIZE") == "1"


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def sanitizer_environment() -> dict[str, str]:
    """The environment of a process that runs kernels built with the sanitizers, or a skip."""
    name = "libasan.so"
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
    runtime = found.stdout.strip()
    if runtime in {"", name}:
        pytest.skip("the compiler has no AddressSanitizer runtime")
    return {
        **os.environ,
        "FASTAGG_SIMT_SANITIZE": "1",
        "LD_PRELOAD": runtime,
        # Python and torch keep memory until they end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _digest(source: Path, flags: list[str]) -> str:
    digest = hashlib.sha256("\0".join([str(source), *flags]).encode())
    for path in [source, *sorted([*CSRC.rglob("*.h"), *SHIM.rglob("*.h")])]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{what}:\n{done.stderr}"


def load(
    name: str, sources: Iterable[Path], extra: Iterable[str] = (), bindings: Iterable[Path] = ()
) -> ctypes.CDLL:
    """The shared library of `sources` and the shim; objects are compiled once per content.

    `bindings` are sources besides that know torch, by its stable ABI.
    """
    sources = [SHIM / "simt.cpp", *sources]
    flags = [*FLAGS, *(SANITIZERS if SANITIZED else []), *extra]
    OBJECTS.mkdir(parents=True, exist_ok=True)

    bindings = list(bindings)

    def compiled(source: Path, flags: list[str] = flags) -> str:
        target = OBJECTS / f"{source.stem}-{_digest(source, flags)}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            _run([compiler(), *flags, "-c", str(source), "-o", str(partial)], source.name)
            partial.replace(target)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        wanted = [pool.submit(compiled, source) for source in sources]
        wanted += [pool.submit(compiled, source, [*flags, *TORCH_FLAGS]) for source in bindings]
        objects = [each.result() for each in wanted]
    digest = hashlib.sha256("".join(objects).encode()).hexdigest()[:16]
    library = OBJECTS / f"lib{name}-{digest}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        linked = [compiler(), "-shared", *(SANITIZERS if SANITIZED else []), *objects]
        linked += TORCH_LIBRARIES if bindings else []
        _run([*linked, "-Wl,-Bsymbolic", "-o", str(partial)], name)
        partial.replace(library)
    return ctypes.CDLL(str(library))


def in_every_order(
    library: ctypes.CDLL, run: Callable[[], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """What `run` returns, after the threads ran forward, in reverse and at random: with equal bits."""
    results = []
    for order in range(3):
        library.simt_set_order(order)
        results.append(run())
    library.simt_set_order(0)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            same = first.contiguous().view(torch.uint8) == second.contiguous().view(torch.uint8)
            assert bool(same.all()), "the result depends on the order of threads"
    return results[0]


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())
