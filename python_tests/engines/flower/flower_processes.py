"""Flower's own programs in processes of their own: offline, on free ports, and gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]
APP = ROOT / "examples" / "flower"

# In every Python process: connections that would leave the machine are noted, and refused.
NO_NETWORK = """
import os, socket
connect = socket.socket.connect
def checked(self, address):
    stream = self.family in (socket.AF_INET, socket.AF_INET6) and self.type == socket.SOCK_STREAM
    if stream and address[0] not in ("127.0.0.1", "::1", "localhost", *OWN):
        with open(os.environ["NETWORK_LOG"], "a") as log:
            log.write(f"{address}\\n")
        raise OSError(f"no network in tests: {address}")
    return connect(self, address)
try:
    OWN = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None)}
except OSError:
    OWN = set()
socket.socket.connect = checked
"""


@dataclass
class Flower:
    """A place for Flower: its home, its environment, its processes."""

    home: Path
    env: dict[str, str]
    network_log: Path
    logs: list[Path] = field(default_factory=list)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *arguments: str) -> None:
        """Starts a program that goes on."""
        log = self.home / f"{name}-{len(self.logs)}.log"
        self.logs.append(log)
        command = [_program(name), *arguments]
        with log.open("w") as out:
            self.started.append(subprocess.Popen(command, env=self.env, stdout=out, stderr=out))

    def run(self, *arguments: str, timeout: float) -> str:
        """Runs the app of the example to its end; returns what it printed."""
        shutil.copytree(APP, self.home / "app", ignore=shutil.ignore_patterns("__pycache__"))
        command = [_program("flwr"), "run", str(self.home / "app"), *arguments]
        log = self.home / "run.log"
        try:
            with log.open("w") as out:
                options = {"env": self.env, "stdout": out, "stderr": out, "timeout": timeout}
                subprocess.run(command, check=True, **options)
        except subprocess.SubprocessError as error:
            raise AssertionError(self.told(f"{error}\n{log.read_text()}")) from error
        return log.read_text()

    def told(self, printed: str) -> str:
        """All that may say why something went wrong."""
        logs = [*self.logs, *self.home.glob("local-superlink/*.log")]
        return printed + "".join(f"\n--- {log.name}\n{log.read_text()[-5000:]}" for log in logs)

    def processes(self) -> list[psutil.Process]:
        """Those that live in this home."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == str(self.home):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def superlink(self) -> psutil.Process:
        """The one that ``flwr run`` has started, and leaves running."""
        (found,) = (p for p in self.processes() if any("flower-superlink" in x for x in p.cmdline()))
        return found

    def is_empty_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True


@contextmanager
def flower(home: Path) -> Iterator[Flower]:
    """A home of Flower's, of which no process and nothing outside is left.

    Raises:
        AssertionError: something was to be fetched from elsewhere.
    """
    home.mkdir()
    (home / "site").mkdir()
    (home / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    # Without it Ray asks the metadata services of clouds where it runs, whatever the switches say.
    (home / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
    # Ray puts sockets there, whose paths may not be long.
    short = Path(tempfile.mkdtemp(prefix="ray-"))
    env = os.environ | {
        "HOME": str(home),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(short),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "huggingface"),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "NETWORK_LOG": str(home / "network.log"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(home / "site"), str(ROOT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    made = Flower(home, env, home / "network.log")
    try:
        yield made
        assert not made.network_log.exists(), made.network_log.read_text()
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            for process in made.processes():
                try:
                    process.send_signal(stop)
                except psutil.Error:
                    continue
            if made.is_empty_within(15):
                break
        for process in made.started:
            process.wait(timeout=15)
        shutil.rmtree(short, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)
