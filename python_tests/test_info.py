"""The environment report, where all is well and where nothing loads."""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastagg
from fastagg import ops
from fastagg.cli.tables import info_tables
from fastagg.info import BACKENDS, environment

PACKAGE = Path(fastagg.__file__).parent


def report_of(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`fastagg info` of the package that lies in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "fastagg", "info", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def rendered(found: dict[str, Any]) -> str:
    """The tables of a report as text, on a screen wide enough for every path."""
    screen = Console(width=500, record=True, file=io.StringIO())
    screen.print(*info_tables(found))
    return screen.export_text()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return environment()


def test_versions_are_those_in_use(report: dict[str, Any]) -> None:
    assert report["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    # Distributions name the local part of a version in their own way: 2.11.0 for 2.11.0+cu130.
    assert torch.__version__.startswith(report["packages"]["torch"])
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert report["torch"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert report["cpu"]["cores"] == os.cpu_count()
    assert json.loads(json.dumps(report)) == report


def test_every_op_has_its_kernels(report: dict[str, Any]) -> None:
    wrappers = {name for name, value in vars(ops).items()
                if inspect.isfunction(value) and not name.startswith("_")}
    assert {"stack", "stack_", "reconstruct_"} <= wrappers <= set(report["ops"])
    for op, kernels in report["ops"].items():
        assert set(kernels) == set(BACKENDS)
        assert kernels["CPU"], op
        assert kernels["Meta"], op
        assert kernels["CUDA"] == report["libraries"]["_cuda"]["loaded"], op
    assert report["ops"]["reconstruct_"]["ADInplaceOrView"]
    assert not report["ops"]["gram"]["ADInplaceOrView"]


def test_libraries_tell_what_they_were_built_with(report: dict[str, Any]) -> None:
    for name in ("_C", "_host"):
        library = report["libraries"][name]
        assert library["loaded"]
        assert Path(library["path"]).exists()
        assert library["error"] is None
    build = report["libraries"]["build"]
    assert {"compiler", "torch", "cuda", "cuda_architectures", "nvcc"} <= set(build)
    assert (build["cuda"] == "built") == bool(build["cuda_architectures"]) == bool(build["nvcc"])


def test_it_tells_whether_the_cuda_kernels_can_be_used_and_why_not(report: dict[str, Any]) -> None:
    library = report["libraries"]["_cuda"]
    assert library["loaded"] == (library["error"] is None)
    assert not library["loaded"] or torch.version.cuda is not None
    assert report["cuda"]["usable"] == (report["cuda"]["why_not"] is None)
    assert not report["cuda"]["usable"] or torch.cuda.is_available()
    if not library["loaded"]:
        assert report["cuda"]["why_not"] == library["error"]
        assert library["error"] in rendered(report)
    gpu = {"name": "a GPU", "capability": "7.5", "memory": 2**34, "multiprocessors": 40}
    for obstacle in (None, "none of these runs on a GPU"):
        shown = rendered({**report, "gpus": [{**gpu, "obstacle": obstacle}]})
        assert (obstacle or "the CUDA kernels run on it") in shown


@pytest.mark.parametrize("damage", ["absent", "garbage"])
def test_it_tells_why_a_library_does_not_load(tmp_path: Path, damage: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fastagg", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if damage == "garbage":
        (tmp_path / "fastagg" / "_C.so").write_bytes(b"not a library")
    done = report_of(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    library = found["libraries"]["_C"]
    assert not library["loaded"]
    assert library["error"]
    assert str(tmp_path) in library["path"]
    assert found["ops"] == {}
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert library["path"] in rendered(found)


def test_it_works_without_torch(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fastagg", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "torch.py").write_text('raise ImportError("libtorch_cpu.so: no such file")')
    done = report_of(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for part in ("torch", "gpus", "cuda", "libraries", "ops"):
        assert "libtorch_cpu.so" in found[part]["error"], part
    assert "libtorch_cpu.so" in rendered(found)
    table = report_of(tmp_path)
    assert table.returncode == 0, table.stderr
    assert "libtorch_cpu.so" in table.stdout
