"""The compiled library: its ABI, its schemas, what it links against, and what importing it costs."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastagg
from fastagg import _library, ops

LIBRARY = Path(fastagg.__file__).parent / "_C.so"

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
    "reconstruct": "(Tensor A, Tensor Bt, Tensor? coefficients, ScalarType dtype) -> Tensor",
    "reconstruct_": "(Tensor(a!) base, Tensor A, Tensor Bt, Tensor? coefficients) -> ()",
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


def audit() -> dict[str, Any]:
    """torch-abi-audit's findings, by the command beside this Python, or by its module."""
    beside = Path(sys.executable).with_name("torch-abi-audit")
    command = [str(beside)] if beside.exists() else [sys.executable, "-m", "torch_abi_audit"]
    done = subprocess.run(
        [*command, "--json", "--check", "torch", str(LIBRARY)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"not on the stable ABI:\n{done.stdout}\n{done.stderr}"
    return dict(json.loads(done.stdout))


def test_the_library_is_on_the_stable_abi_of_torch_2_11() -> None:
    pytest.importorskip("torch_abi_audit")
    (library,) = audit()["bundled_libs"]
    found = library["torch"]
    assert Path(library["path"]) == LIBRARY
    assert found["uses_torch"]
    assert found["stable"]
    assert found["unstable_symbols"] == found["unknown_shim_symbols"] == []
    assert found["min_torch_version"] == "2.11.0"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_the_library_links_no_unstable_symbol() -> None:
    """Everything of torch that it takes is a C function of the stable shim: no C++ name of it."""
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    )
    wanted = [line.split()[-1].split("@")[0] for line in done.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in wanted)
    cpp = [name for name in wanted if name.startswith("_Z")]
    unstable = [name for name in cpp if any(word in name for word in ("2at", "3c10", "5torch"))]
    assert unstable == []
    shims = [name for name in wanted if "torch" in name]
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in shims)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_the_library_exports_next_to_nothing() -> None:
    """Hidden by default: two libraries in one process must not take each other's kernels."""
    done = subprocess.run(
        ["nm", "-D", "--defined-only", "-C", str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line for line in done.stdout.splitlines() if "fastagg::" in line] == []


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
    assert Path(_library.OPS.path) == LIBRARY
