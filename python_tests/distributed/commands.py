"""`fastagg aggregate` as several processes, and what ends them before their time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Something happens to one rank in the middle of its work, in place of a method.
PROGRAM = """
import os, signal, time
from fastagg.handouts.folder import HandoutFolder
from fastagg.handouts.writer import HandoutWriter

usual = {method}

def interrupted(*arguments, **options):
    if os.environ["RANK"] == {rank!r}:
        {what}
    else:
        usual(*arguments, **options)

{method} = interrupted
from fastagg.cli.app import main
main()
"""

# The folder is begun; all have written to it, and the first brings it to the disk.
WRITING = "HandoutWriter.write"
COMMITTING = "HandoutFolder.commit"

DIES = "os.kill(os.getpid(), signal.SIGKILL)"
HANGS = "os.kill(os.getpid(), signal.SIGSTOP)"
IS_SLOW = "time.sleep(60)"


def interrupted(rank: int, what: str, method: str = WRITING) -> str:
    """The command's program, to whose one rank something happens."""
    return PROGRAM.format(rank=str(rank), what=what, method=method)


def environment() -> dict[str, str]:
    """This package's, whatever is installed, and no more threads than the machine has cores for."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    few = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "NO_COLOR": "1"}
    return {**os.environ, **few, "PYTHONPATH": path}


def ranks_by_hand(
    arguments: Sequence[str], size: int, rank: int, what: str, method: str = WRITING
) -> list[subprocess.Popen[str]]:
    """One process a rank, as any scheduler starts them: nobody ends the others when one fails."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    program = interrupted(rank, what, method)
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={
                **environment(),
                "RANK": str(each),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in range(size)
    ]


def torchrun(size: int, script: Sequence[str]) -> subprocess.Popen[str]:
    """``torchrun`` in a session of its own, so that a signal to it reaches nobody else."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node", str(size), *script],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Kills by their ids what still runs."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
