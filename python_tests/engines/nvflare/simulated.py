"""Runs of NVFlare's simulator, offline, of which no process is left over."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "nvflare"

# Python imports it in every process that the simulator starts.
_OFFLINE = """
import sys

def _refuse(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
        if host not in ("localhost", "::1") and not host.startswith("127."):
            raise RuntimeError(f"a connection to {host}")

sys.addaudithook(_refuse)
"""


def run(folder: Path, script: Path, *arguments: object, timeout: float = 240, **env: str) -> str:
    """What a script and all that it starts print; it has to end well, and everything with it.

    Args:
        folder: home and temporary files are in it.
    """
    offline, home, temporary = (folder / name for name in ("offline", "home", "temporary"))
    for made in (offline, home, temporary):
        made.mkdir(exist_ok=True)
    (offline / "sitecustomize.py").write_text(_OFFLINE)
    marker = secrets.token_hex(8)
    paths = [str(offline), str(ROOT), os.environ.get("PYTHONPATH", "")]
    log = folder / f"{script.stem}-{marker}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=folder,
            env={
                **os.environ,
                "FASTAGG_TEST_RUN": marker,
                "HOME": str(home),
                "TMPDIR": str(temporary),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                **env,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(timeout)
            # A process that is about to end may take a moment.
            deadline = time.monotonic() + 10
            while (left := list(_marked(marker))) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            for each in _marked(marker):
                each.kill()
    text = log.read_text()
    assert process.returncode == 0, text[-8000:]
    assert not left, left
    assert "a connection to" not in text
    assert not list(temporary.glob("nvflare*"))
    return text


def _marked(marker: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get("FASTAGG_TEST_RUN") == marker and process.status() != "zombie":
                yield process
        except psutil.Error:
            continue
