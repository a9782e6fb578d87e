"""Flower's versions: those that work are named where another is installed, or none."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("flwr")


IMPORT = "import fastagg.engines.flower"
VERSION = """
from importlib import metadata
found = metadata.version
metadata.version = lambda name: "{version}" if name == "flwr" else found(name)
"""
MISSING = """
from importlib import metadata
found = metadata.version
def version(name):
    if name == "flwr":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
"""
WORKS = "FastAgg works with flwr >= 1.41, < 1.43: pip install 'fastagg[flower]'"


def python(*lines: str) -> subprocess.CompletedProcess[str]:
    """Runs lines in a process of their own."""
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("version", ["1.40.0", "1.43.0", "2.0.0"])
def test_another_version_is_refused_with_those_that_work(version: str) -> None:
    result = python(VERSION.format(version=version), IMPORT)
    assert result.returncode != 0
    assert f"flwr {version} is installed" in result.stderr and WORKS in result.stderr


@pytest.mark.parametrize("version", ["1.41.0", "1.42.0"])
def test_versions_that_work_are_let_in(version: str) -> None:
    result = python(VERSION.format(version=version), IMPORT)
    assert result.returncode == 0, result.stderr


def test_without_flower_the_error_says_how_to_install_it() -> None:
    result = python(MISSING, IMPORT)
    assert "flwr is not installed" in result.stderr and WORKS in result.stderr


def test_an_interface_that_changed_is_named() -> None:
    result = python("import flwr.serverapp.strategy as changed", "del changed.FedAvg", IMPORT)
    assert "has no flwr.serverapp.strategy.FedAvg" in result.stderr and WORKS in result.stderr


def test_nothing_of_it_is_imported_unless_it_is_used() -> None:
    result = python("import sys, fastagg.engines", "assert 'flwr' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_what_the_package_promises_is_there() -> None:
    import fastagg.engines.flower as flower

    assert all(hasattr(flower, name) for name in flower.__all__)
