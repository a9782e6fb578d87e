"""Builds C++ test programs with the system's compiler and its sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).parent

WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]


def compiler(sanitizer: list[str], folder: Path) -> str:
    """The C++ compiler, or a skip where there is none or its sanitizer's runtime is not installed."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [found, *sanitizer, str(source), "-o", str(folder / "empty")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no sanitizer runtime for {sanitizer[0]}: {done.stderr.strip()[-200:]}")
    if subprocess.run([str(folder / "empty")], capture_output=True).returncode != 0:
        pytest.skip(f"programs built with {sanitizer[0]} do not run here")
    return found


def build(folder: Path, name: str, sources: list[Path], sanitizer: list[str]) -> Path:
    """The program, from `sources`: compiled two at a time, every warning an error."""
    cxx = compiler(sanitizer, folder)
    flags = ["-std=c++17", "-O0", "-g1", "-fno-omit-frame-pointer", *WARNINGS, *sanitizer]

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        command = [cxx, *flags, f"-I{CSRC}", "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}:\n{done.stderr}"
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / name
    command = [cxx, *sanitizer, *objects, "-o", str(program), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    """What the program wrote; a sanitizer's finding fails the test with its report."""
    done = subprocess.run(
        [str(program), *arguments],
        input=stdin,
        capture_output=True,
        timeout=120,
        # Every allocation is checked at exit; frames of threads are told apart.
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"},
    )
    report = done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"exit code {done.returncode}\n{report[-4000:]}"
    return done.stdout
