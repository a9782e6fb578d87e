"""Compiles and links _cuda.so by ninja: one object a file, in parallel, only what changed.

MAX_JOBS           compilers run at a time.
CXX                the compiler of the files without kernels.
NVCC_APPEND_FLAGS  is read by nvcc itself.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from build_cuda import ptxas
from build_cuda.toolkit import Toolkit

# Every kernel's registers and local memory are kept beside its object.
RULES = """\
rule nvcc
  command = {nvcc} -MMD -MF $out.d -c $in -o $out > $out.ptxas 2>&1 || {{ cat $out.ptxas; exit 1; }}
  description = nvcc $in
  depfile = $out.d
  deps = gcc
rule cxx
  command = {cxx} -MMD -MF $out.d -c $in -o $out
  description = {cxx_name} $in
  depfile = $out.d
  deps = gcc
rule stub
  command = {stub} -o $out
rule link
  command = {link} $in {libraries} -o $out
"""


def build_library(
    toolkit: Toolkit,
    kernels: Sequence[Path],
    ops: Sequence[Path],
    ops_flags: Sequence[str],
    folder: Path,
) -> Path:
    """The library of `kernels` (.cu) and `ops` (.cpp that know torch), made in `folder`.

    Ends the build where a file does not compile, and names the kernels that use local memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    statements = [_rules(toolkit, ops_flags), "build libtorch_cuda.so: stub\n"]
    objects = []
    for rule, sources in (("nvcc", kernels), ("cxx", ops)):
        for source in sources:
            objects.append(f"{source.name}.o")
            report = f"| {source.name}.o.ptxas" if rule == "nvcc" else ""
            statements.append(f"build {source.name}.o {report}: {rule} {_path(source)}\n")
    statements.append(f"build _cuda.so: link {' '.join(objects)} | libtorch_cuda.so\n")
    (folder / "build.ninja").write_text("".join(statements))

    jobs = os.environ.get("MAX_JOBS")
    # Beside an environment that is not activated it is no command; a system's own is no module.
    ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
    if subprocess.run([*ninja, *(["-j", jobs] if jobs else [])], cwd=folder).returncode != 0:
        sys.exit("fastagg: the CUDA kernels could not be built; FASTAGG_CUDA=0 leaves them out")
    offenders = ptxas.offenders(folder / f"{source.name}.o.ptxas" for source in kernels)
    if offenders:  # slower, not wrong: the tests refuse it, an installation under another nvcc must not
        print("\n  ".join(["fastagg: kernels that use local memory:", *offenders]), flush=True)
    return folder / "_cuda.so"


def _rules(toolkit: Toolkit, ops_flags: Sequence[str]) -> str:
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    hidden = ["-fPIC", "-fvisibility=hidden"]
    torch_headers = [f"-isystem{path}" for path in include_paths()]
    commands = {
        # In the command, so that objects made with other flags are made anew.
        "nvcc": [
            *["env", f"NVCC_APPEND_FLAGS={os.environ.get('NVCC_APPEND_FLAGS', '')}", toolkit.nvcc],
            *["-std=c++17", "-O3", f"-Xcompiler={','.join(hidden)}", "-Xptxas=-v", *toolkit.gencode()],
        ],
        "cxx": [*cxx, "-std=c++20", *hidden, *ops_flags, "-DUSE_CUDA", *torch_headers],
        "cxx_name": cxx[:1],
        # Stands for torch's library where torch has no CUDA: linked against for its name, which the
        # loader finds among the libraries that torch has loaded.
        "stub": [*cxx, "-shared", "-xc++", "/dev/null", "-Wl,-soname,libtorch_cuda.so"],
        # A CUDA runtime of its own, unseen from outside: torch's may be of another version.
        "link": [
            *[toolkit.nvcc, "-shared", "-cudart=static", *toolkit.gencode()],
            "-Xlinker=--no-as-needed,--exclude-libs=ALL",
        ],
        "libraries": ["-L.", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cuda", "-ltorch_cpu"],
    }
    quoted = {name: shlex.join(words).replace("$", "$$") for name, words in commands.items()}
    return RULES.format(**quoted)


def _path(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))
