"""The source distribution, the wheel that is built from it, and the build's one switch."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from that sdist alone."""
    out = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out))
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return out


def test_sdist_holds_all_that_building_and_testing_need(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for needed in (
        "setup.py",
        "LICENSE",
        "Makefile",
        "csrc/cpu/kernels.h",
        "csrc/ragged/tables.h",
        "python_tests/test_packaging.py",
        "bench/run.py",
    ):
        assert needed in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_installed_wheel_works_away_from_the_source(distributions: Path, tmp_path: Path) -> None:
    wheel = next(distributions.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "fastagg/_C.so" in names
    assert "fastagg/py.typed" in names
    assert not [name for name in names if name.startswith(("csrc", "python_tests", "bench"))]

    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    installed = run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    script = (
        "import torch, fastagg; print(fastagg.__file__);"
        "A, B = torch.randn(3, 8), torch.randn(6, 3);"
        "U, S, Vt, info = fastagg.truncated_svd(A, B, 3);"
        "print(torch.allclose((U * S) @ Vt, B @ A, atol=1e-4))"
    )
    used = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target))
    assert used.returncode == 0, used.stderr
    place, right = used.stdout.split()
    assert Path(place).is_relative_to(target)
    assert right == "True"


def test_required_cuda_fails_loudly_where_there_are_no_cuda_kernels(tmp_path: Path) -> None:
    build = (sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path))
    refused = run(*build, FASTAGG_CUDA="1")
    assert refused.returncode != 0
    assert "FASTAGG_CUDA=1 requires the CUDA kernels, but this version has CPU kernels only" in (
        refused.stderr
    )


def test_unknown_switch_is_refused(tmp_path: Path) -> None:
    build = (sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path))
    refused = run(*build, FASTAGG_CUDA="yes")
    assert refused.returncode != 0
    assert "FASTAGG_CUDA must be auto, 0 or 1, got 'yes'" in refused.stderr


def test_automatic_build_says_what_it_left_out(tmp_path: Path) -> None:
    asked = run(sys.executable, "setup.py", "--version", FASTAGG_CUDA="auto")
    assert asked.returncode == 0, asked.stderr
    lines = [line for line in asked.stdout.splitlines() if "CUDA" in line]
    assert lines == ["fastagg: CUDA kernels left out: this version has CPU kernels only"]
