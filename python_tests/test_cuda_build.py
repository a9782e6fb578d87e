"""The CUDA library without a GPU: how it is built, what ptxas says of its kernels, and that it loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastagg
from build_cuda import ptxas
from build_cuda.library import build_library
from build_cuda.toolkit import WHEEL, WITHOUT_GPU, LeftOut, Toolkit, find_toolkit
from fastagg import _library, ops

ROOT = Path(__file__).parents[1]
LIBRARY = Path(fastagg.__file__).parent / "_cuda.so"
KERNELS = ROOT / "csrc" / "cuda"
REPORTS = ROOT / "build" / "cuda"

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc", path=os.environ["PATH"] + ":/usr/local/cuda/bin") is None, reason="needs nvcc"
)
built = pytest.mark.skipif(
    _library.status()["build"].get("cuda") != "built", reason="the build left the CUDA kernels out"
)

# A dot product of a window: some 64 values a thread live at once.
SPILLS = """
#include "width.h"
namespace tests {
namespace {
__global__ void window(const float* in, float* out, int steps) {
  float kept[kWidth];
  for (int i = 0; i < kWidth; ++i) kept[i] = in[i * blockDim.x + threadIdx.x];
  for (int step = 0; step < steps; ++step)
    for (int i = 0; i < kWidth; ++i) kept[i] = kept[i] * kept[(i + 7) % kWidth] + in[step];
  for (int i = 0; i < kWidth; ++i) out[i * blockDim.x + threadIdx.x] = kept[i];
}
}  // namespace
void* kernel() { return reinterpret_cast<void*>(&window); }
}  // namespace tests
"""
INDEXES = """
namespace tests {
__global__ void lookup(const int* in, int* out) {
  int table[32];
  for (int i = 0; i < 32; ++i) table[in[i] & 31] = i;
  out[threadIdx.x] = table[in[threadIdx.x] & 31];
}
}  // namespace tests
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two kernels, one of which includes a header, and a file without kernels."""
    (tmp_path / "width.h").write_text("constexpr int kWidth = 64;\n")
    (tmp_path / "window.cu").write_text(SPILLS)
    (tmp_path / "lookup.cu").write_text(INDEXES)
    (tmp_path / "host.cpp").write_text("int answer() { return 42; }\n")
    return tmp_path


def build(project: Path, *kernels: str, architectures: list[str] | None = None) -> Path:
    found = find_toolkit(local=True)
    toolkit = Toolkit(found.nvcc, found.version, architectures or ["8.0"], [])
    sources = [project / f"{name}.cu" for name in kernels]
    return build_library(toolkit, sources, [project / "host.cpp"], ["-O1"], project / "made")


@needs_nvcc
def test_only_what_changed_is_compiled(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.setattr(ptxas, "COLD", {"lookup": "its table is what is tested"})

    def times() -> dict[str, int]:
        build(project, "window", "lookup")
        return {path.name: path.stat().st_mtime_ns for path in (project / "made").glob("*.o")}

    first = times()
    assert set(first) == {"window.cu.o", "lookup.cu.o", "host.cpp.o"}
    assert times() == first
    (project / "width.h").write_text("constexpr int kWidth = 8;\n")
    changed = times()
    assert {name for name in first if first[name] != changed[name]} == {"window.cu.o"}


@needs_nvcc
def test_a_kernel_that_uses_local_memory_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-maxrregcount=32")
    build(project, "window", "lookup", architectures=["8.0", "9.0a"])
    lines = capsys.readouterr().out.splitlines()[1:]
    # kernel, architecture -> bytes of stack frame, spill stores and spill loads
    found = {}
    for line in lines:
        kernel, _, counts = line.strip().rpartition(": ")
        found[kernel] = [int(word) for word in counts.split() if word.isdigit()]
    spilling = "tests::(anonymous namespace)::window(float const*, float*, int) for sm_{}"
    indexing = "tests::lookup(int const*, int*) for sm_{}"
    assert set(found) == {name.format(sm) for name in (spilling, indexing) for sm in ("80", "90a")}
    for sm in ("80", "90a"):
        assert min(found[spilling.format(sm)]) > 0
        assert found[indexing.format(sm)] == [128, 0, 0]
    # A flag of the environment is part of what an object was made with.
    monkeypatch.delenv("NVCC_APPEND_FLAGS")
    build(project, "window", architectures=["8.0", "9.0a"])
    assert "local memory" not in capsys.readouterr().out


@needs_nvcc
def test_a_compiler_error_is_shown_and_ends_the_build(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "lookup.cu").write_text("#error no such table\n")
    with pytest.raises(SystemExit, match="FASTAGG_CUDA=0 leaves them out"):
        build(project, "lookup")
    assert "no such table" in capfd.readouterr().out


def imitation(folder: Path, release: str, architectures: str = "80 86 89 90 100 120") -> Path:
    """A toolkit whose nvcc tells its version and architectures, and nothing else."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    listed = "".join(f"\\ncompute_{number}" for number in architectures.split())
    nvcc.write_text(
        "#!/bin/sh\n"
        f"if [ $1 = --version ]; then echo 'release {release[:4]}, V{release}'; "
        f"else printf '{listed}'; fi\n"
    )
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("no_gpu")
def test_architectures_of_a_wheel_and_of_a_local_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(imitation(tmp_path, "13.0.88")))
    assert find_toolkit(local=False).architectures == WHEEL
    assert find_toolkit(local=False).gencode()[-2:] == [
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert find_toolkit(local=True).architectures == WITHOUT_GPU
    capabilities = {0: (9, 0), 1: (8, 6), 2: (9, 0)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    assert find_toolkit(local=True).architectures == ["8.6", "9.0a"]
    assert find_toolkit(local=True).version == "13.0.88"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        ("8.0;9.0a;12.0+PTX", ["8.0", "9.0a", "12.0+PTX"]),
        ("8.9 9.0", ["8.9", "9.0"]),
        (" 10.0f, 8.0;8.0;", ["10.0f", "8.0"]),
        (";", WHEEL),
    ],
)
def test_architectures_as_torch_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, chosen: list[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(imitation(tmp_path, "13.0.88")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    found = find_toolkit(local=False)
    assert (found.architectures, found.left_out) == (chosen, [])


def test_ptx_of_an_architecture_that_is_alone_is_that_of_its_family() -> None:
    assert Toolkit("nvcc", "13.0.88", ["9.0a+PTX"], []).gencode() == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.usefixtures("no_gpu")
def test_architectures_that_cannot_be_had_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(imitation(tmp_path, "12.4.99", "80 86 89 90")))
    found = find_toolkit(local=False)
    assert found.architectures == ["8.0", "8.6", "8.9", "9.0a"]
    unknown = "(nvcc 12.4.99 does not know it)"
    assert found.left_out == [f"10.0 {unknown}", f"12.0+PTX {unknown}"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(LeftOut, match=r"no architecture remains without 7\.5 \(the kernels need 8\.0"):
        find_toolkit(local=True)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST.*'Hopper'"):
        find_toolkit(local=True)


def test_a_toolkit_that_is_absent_or_old_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(LeftOut, match=f"nvcc was not found in CUDA_HOME={tmp_path}"):
        find_toolkit(local=True)
    imitation(tmp_path, "11.8.89")
    with pytest.raises(LeftOut, match=r"nvcc 11\.8\.89 is older than 12\.0"):
        find_toolkit(local=True)
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(LeftOut, match="nvcc does not run"):
        find_toolkit(local=True)


@built
@pytest.mark.skipif(not REPORTS.is_dir(), reason="the library was not built here")
@pytest.mark.parametrize("name", sorted(path.name for path in KERNELS.glob("*.cu")))
def test_no_kernel_uses_local_memory(name: str) -> None:
    report = REPORTS / f"{name}.o.ptxas"
    text = report.read_text()
    assert "warning" not in text
    found = ptxas.read_report(text)
    if "__global__" in (KERNELS / name).read_text():
        wanted = {built.partition("+")[0].replace(".", "") for built in _library.architectures()}
        assert {memory.architecture for memory in found} == wanted
    assert ptxas.offenders([report]) == []


@built
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_the_library_needs_torch_alone_wherever_it_lies() -> None:
    done = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True)
    needed = {line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "(NEEDED)" in line}
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
    system = {"libc", "libm", "libdl", "librt", "libpthread", "libstdc++", "libgcc_s", "ld-linux-x86-64"}
    assert {name.split(".so")[0] for name in needed} - system == {"libtorch_cuda", "libtorch_cpu"}
    assert "RPATH" not in done.stdout and "RUNPATH" not in done.stdout


LOAD = """
import json, sys, torch
stand_in, *libraries = sys.argv[1:]
if torch.version.cuda is None:
    import ctypes
    ctypes.CDLL(stand_in)
for library in libraries:
    torch.ops.load_library(library)
names = {schema.name for schema in torch._C._jit_get_all_schemas()}
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
found = {name: has_kernel(name, "CUDA") for name in names if name.startswith("fastagg::")}
print(json.dumps([found, torch.cuda.is_initialized()]))
"""


@built
@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("cc") is None, reason="needs nm and cc")
def test_every_op_has_a_kernel_when_the_library_is_loaded(tmp_path: Path) -> None:
    """Also on a torch without CUDA: the loader takes any library with the name of torch's, if it has the
    functions that torch's own would have."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", "--format=just-symbols", LIBRARY],
        capture_output=True,
        text=True,
        check=True,
    )
    functions = [name for name in listed.stdout.split() if "torch" in name and "cuda" in name]
    assert "aoti_torch_get_current_cuda_stream" in functions
    source = tmp_path / "torch_cuda.c"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in functions))
    stand_in = tmp_path / "libtorch_cuda.so"
    named = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run(["cc", *named, str(source), "-o", str(stand_in)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(stand_in), _library.OPS.path, str(LIBRARY)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels, initialised = json.loads(done.stdout)
    assert kernels == {f"fastagg::{name}": True for name in ops._NAMES}
    assert not initialised
