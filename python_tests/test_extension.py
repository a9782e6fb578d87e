"""The compiled library: its ABI, its schemas, what it links against, and what importing it costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_samples import samples

import fastagg
from fastagg import _library, ops
from fastagg.errors import InvalidInput
from fastagg.rounds.options import parse_device

PACKAGE = Path(fastagg.__file__).parent
LIBRARIES = [
    pytest.param(
        PACKAGE / f"{name}.so",
        id=name,
        marks=pytest.mark.skipif(not (PACKAGE / f"{name}.so").exists(), reason="was left out"),
    )
    for name in ("_C", "_cuda")
]
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")

# The interface that plans, engines and compiled CUDA kernels are written against: a change here is a
# change for all of them.
SCHEMAS = {
    "scan": "(Tensor flat, Tensor spans) -> (Tensor nonfinite, Tensor sum_of_squares)",
    "stack": (
        "(Tensor[] flats, Tensor slots, Tensor? scale, int modules, int rows, int m, int n, "
        "ScalarType dtype) -> (Tensor A, Tensor Bt, Tensor nonfinite, Tensor sum_of_squares)"
    ),
    "stack_": (
        "(Tensor(a!) A, Tensor(b!) Bt, Tensor[] flats, Tensor slots, Tensor? scale) "
        "-> (Tensor nonfinite, Tensor sum_of_squares)"
    ),
    "reconstruct": (
        "(Tensor A, Tensor Bt, Tensor? coefficients, ScalarType dtype, int route=0) -> Tensor"
    ),
    "reconstruct_": (
        "(Tensor(a!) base, Tensor A, Tensor Bt, Tensor? coefficients, int route=0) -> ()"
    ),
    "gram": "(Tensor A, Tensor Bt) -> (Tensor, Tensor)",
    "update_gram": (
        "(Tensor A, Tensor Bt, Tensor? coefficients, Tensor owners, int clients) -> Tensor"
    ),
    "gram_svd": (
        "(Tensor A, Tensor Bt, Tensor? coefficients, int rank) "
        "-> (Tensor U, Tensor S, Tensor Vt, Tensor stats)"
    ),
    "randomized_svd": (
        "(Tensor A, Tensor Bt, Tensor? coefficients, int rank, int oversampling, "
        "int power_iterations, int seed, Tensor? streams) "
        "-> (Tensor U, Tensor S, Tensor Vt, Tensor stats)"
    ),
    "randomized_svd_dense": (
        "(Tensor W, int rank, int oversampling, int power_iterations, int seed, Tensor? streams) "
        "-> (Tensor U, Tensor S, Tensor Vt, Tensor stats)"
    ),
    "redistribute": (
        "(Tensor U, Tensor S, Tensor Vt, Tensor slots, Tensor scalings, int[] sizes) -> Tensor[]"
    ),
    "redistribute_": (
        "(Tensor(a!)[] flats, Tensor U, Tensor S, Tensor Vt, Tensor slots, Tensor scalings) -> ()"
    ),
}


def audit(library: Path) -> dict[str, Any]:
    """torch-abi-audit's findings, by the command beside this Python, or by its module."""
    beside = Path(sys.executable).with_name("torch-abi-audit")
    command = [str(beside)] if beside.exists() else [sys.executable, "-m", "torch_abi_audit"]
    done = subprocess.run(
        [*command, "--json", "--check", "torch", str(library)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"not on the stable ABI:\n{done.stdout}\n{done.stderr}"
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_library_is_on_the_stable_abi_of_torch_2_11(library: Path) -> None:
    pytest.importorskip("torch_abi_audit")
    (audited,) = audit(library)["bundled_libs"]
    found = audited["torch"]
    assert Path(audited["path"]) == library
    assert found["uses_torch"]
    assert found["stable"]
    assert found["unstable_symbols"] == found["unknown_shim_symbols"] == []
    assert found["min_torch_version"] == "2.11.0"


@needs_nm
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_library_links_no_unstable_symbol(library: Path) -> None:
    """Everything of torch that it takes is a C function of the stable shim: no C++ name of it."""
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    wanted = [line.split()[-1].split("@")[0] for line in done.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in wanted)
    cpp = [name for name in wanted if name.startswith("_Z")]
    unstable = [name for name in cpp if any(word in name for word in ("2at", "3c10", "5torch"))]
    assert unstable == []
    shims = [name for name in wanted if "torch" in name]
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in shims)


@needs_nm
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_library_exports_next_to_nothing(library: Path) -> None:
    """Hidden by default: two libraries in one process must not take each other's kernels, nor torch the
    CUDA runtime that is linked into ours."""
    done = subprocess.run(
        ["nm", "-D", "--defined-only", "-C", str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.split(maxsplit=2)[-1] for line in done.stdout.splitlines()]
    assert [name for name in names if "fastagg::" in name or name.startswith(("cu", "__cuda"))] == []


def test_exactly_these_ops_with_exactly_these_schemas() -> None:
    found = {
        schema.name.removeprefix("fastagg::"): str(schema)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fastagg::")
    }
    assert set(found) == set(SCHEMAS)
    for name, arguments in SCHEMAS.items():
        expected = torch._C.parse_schema(f"fastagg::{name}{arguments}")
        assert found[name] == str(expected)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_op_has_its_kernels(name: str) -> None:
    for key in ("CPU", "Meta", "Autograd", "ADInplaceOrView"):
        if key == "ADInplaceOrView" and not name.endswith("_"):
            continue
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastagg::{name}", key), key


def test_codes_of_the_tables() -> None:
    expected = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    assert expected == ops.DTYPE_CODES


IMPORT = """
import time
start = time.perf_counter()
import {first}
middle = time.perf_counter()
{second}
print(middle - start, time.perf_counter() - middle)
"""


def seconds(first: str, second: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT.format(first=first, second=second)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    values = [float(word) for word in done.stdout.split()]
    return values[0], values[1]


def test_importing_costs_little_more_than_torch() -> None:
    """And so do the ops. Of several: other load on the machine only ever adds."""
    costs = [seconds("torch", "import fastagg, fastagg.ops, fastagg.linalg")[1] for _ in range(3)]
    assert statistics.median(costs) < 0.3 or min(costs) < 0.15, f"{costs} s"


def test_importing_loads_no_heavy_library() -> None:
    listed = "import fastagg.ops, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    heavy = {"transformers", "peft", "safetensors", "pydantic", "typer", "rich", "matplotlib"}
    assert heavy & loaded == set()


def test_a_library_that_is_missing_says_what_to_do() -> None:
    missing = _library.Library("_C", "/nowhere/_C.so", False, "the file does not exist")
    with pytest.raises(ImportError, match=r"_C \(/nowhere/_C.so\).*does not exist.*torch >= 2.11"):
        _library.require(missing)
    assert _library.OPS.loaded
    assert Path(_library.OPS.path) == PACKAGE / "_C.so"


@pytest.mark.parametrize(
    ("has", "why"),
    [
        ({"built": "left out of the build: nvcc was not found"}, "left out of the build: nvcc"),
        ({"cuda": None}, "is built without CUDA"),
        ({"file": None}, "the file does not exist"),
        ({"file": b"not a library"}, r"_cuda\.so: (file too short|invalid ELF header)"),
    ],
    ids=["left out", "CPU torch", "no file", "garbage"],
)
def test_it_knows_why_the_cuda_kernels_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: dict[str, Any], why: str
) -> None:
    build = {"cuda": has.get("built", "built"), "cuda_architectures": "8.0"}
    monkeypatch.setattr(_library, "_build_info", lambda: build)
    monkeypatch.setattr(torch.version, "cuda", has.get("cuda", "13.0"))
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    if has.get("file") is not None:
        (tmp_path / "_cuda.so").write_bytes(has["file"])
    found = _library._load_cuda()
    assert not found.loaded
    assert found.error is not None and re.search(why, found.error)
    monkeypatch.setattr(_library, "CUDA", found)
    assert _library.cuda_obstacle() == found.error


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Capabilities of the GPUs that torch sees, none at first; the kernels are loaded."""
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(_library, "CUDA", _library.Library("_cuda", "_cuda.so", True))
    monkeypatch.setattr(_library, "_build_info", lambda: {"cuda_architectures": "8.0;8.6;9.0a;12.0+PTX"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(seen))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: seen[index or 0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    return seen


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        *[((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 9), True), ((9, 0), True)],
        *[((9, 1), False), ((10, 0), False), ((12, 0), True), ((12, 1), True), ((13, 0), True)],
    ],
)
def test_which_gpus_the_kernels_run_on(
    gpus: list[tuple[int, int]], capability: tuple[int, int], runs: bool
) -> None:
    gpus.append(capability)
    obstacle = _library.cuda_obstacle()
    assert (obstacle is None) == runs
    if obstacle is not None:
        major, minor = capability
        assert f"none of these runs on a GPU ({major}.{minor})" in obstacle


def test_devices_as_users_give_them(gpus: list[tuple[int, int]]) -> None:
    assert parse_device("auto") == parse_device("cpu") == torch.device("cpu")
    with pytest.raises(InvalidInput, match="torch finds no GPU"):
        parse_device("cuda")
    gpus += [(9, 0), (7, 5)]
    assert parse_device("auto") == parse_device("cuda") == torch.device("cuda", 0)
    assert parse_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(InvalidInput, match=r"compiled for 8\.0, .* none of these runs on .*7\.5"):
        parse_device("cuda:1")
    with pytest.raises(InvalidInput, match="there is no GPU 2: torch finds 2"):
        parse_device("cuda:2")
    for wrong in ("gpu", "cuda:", "cuda:-1", "cpu:0", "cuda:1 "):
        with pytest.raises(InvalidInput, match="no such option"):
            parse_device(wrong)


@pytest.mark.skipif(_library.CUDA.loaded, reason="the CUDA kernels are loaded")
@pytest.mark.parametrize("name", SCHEMAS)
def test_an_op_without_its_cuda_kernel_says_why(name: str, rng: torch.Generator) -> None:
    """Sent to where the dispatcher sends CUDA tensors, which not every torch can have."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = getattr(torch.ops.fastagg, name).default
    why = re.escape(f"fastagg::{name}: expected CPU tensors, got CUDA tensors") + ".*"
    with pytest.raises(NotImplementedError, match=why + re.escape(str(_library.CUDA.error))):
        op.redispatch(cuda, *samples(rng)[name][0])
