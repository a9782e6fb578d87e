"""The source distribution, the wheel that is built from it, and the build's one switch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


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
    """The sdist, and the wheel built from that sdist alone, for one architecture to save time."""
    out = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out))
    built = run(*command, FASTAGG_CUDA="auto", TORCH_CUDA_ARCH_LIST="9.0a")
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return out


def test_sdist_holds_all_that_building_and_testing_need(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    kernels = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc" / "ops" / "cuda").iterdir()]
    assert {str(path.relative_to(ROOT)) for path in kernels} <= names
    for needed in (
        "setup.py",
        "LICENSE",
        "Makefile",
        "csrc/cpu/kernels.h",
        "csrc/ragged/tables.h",
        "build_cuda/library.py",
        "python_tests/test_packaging.py",
        "bench/gpu.sh",
    ):
        assert needed in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_installed_wheel_works_away_from_the_source(distributions: Path, tmp_path: Path) -> None:
    wheel = next(distributions.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "fastagg/_C.so" in names
    assert "fastagg/py.typed" in names
    assert ("fastagg/_cuda.so" in names) == (NVCC is not None)
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"fastagg"}
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.stem.split("-")[-3:] == [python, python, platform]

    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    installed = run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    script = (
        "import torch, fastagg; print(fastagg.__file__);"
        "A, B = torch.randn(3, 8), torch.randn(6, 3);"
        "U, S, Vt, info = fastagg.truncated_svd(A, B, 3);"
        "print(torch.allclose((U * S) @ Vt, B @ A, atol=1e-4));"
        "from fastagg import _library; print(*_library.architectures())"
    )
    used = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target))
    assert used.returncode == 0, used.stderr
    place, right, *architectures = used.stdout.split()
    assert Path(place).is_relative_to(target)
    assert right == "True"
    assert architectures == (["9.0a"] if NVCC else [])


BUILD = (sys.executable, "setup.py", "build_ext", "--build-lib")


def test_required_cuda_fails_loudly_where_there_is_no_nvcc(tmp_path: Path) -> None:
    refused = run(*BUILD, str(tmp_path), FASTAGG_CUDA="1", CUDA_HOME=str(tmp_path))
    assert refused.returncode != 0
    assert "FASTAGG_CUDA=1 requires the CUDA kernels, but nvcc was not found" in refused.stderr


@needs_nvcc
def test_required_cuda_fails_loudly_where_an_architecture_is_missing(tmp_path: Path) -> None:
    refused = run(*BUILD, str(tmp_path), FASTAGG_CUDA="1", TORCH_CUDA_ARCH_LIST="7.0;8.0")
    assert refused.returncode != 0
    assert "FASTAGG_CUDA=1 requires all architectures, but these are left out: 7.0" in refused.stderr


def test_unknown_switch_is_refused(tmp_path: Path) -> None:
    refused = run(*BUILD, str(tmp_path), FASTAGG_CUDA="yes")
    assert refused.returncode != 0
    assert "FASTAGG_CUDA must be auto, 0 or 1, got 'yes'" in refused.stderr


def test_automatic_build_says_in_a_line_what_it_left_out(tmp_path: Path) -> None:
    # A compiler that fails at once: the line comes before.
    broken = {"CC": "false", "CXX": "false", "CUDA_HOME": str(tmp_path)}
    asked = run(*BUILD, str(tmp_path), FASTAGG_CUDA="auto", **broken)
    lines = [line for line in asked.stdout.splitlines() if "CUDA" in line]
    reason = f"nvcc was not found in CUDA_HOME={tmp_path}"
    assert lines == [f"fastagg: CUDA kernels left out: {reason}"]
