"""Processes that wait for work as the ranks of a gloo group: they are started once for many tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 4
SECONDS = 60


class Ranks:
    """Four processes; a job runs on the first two, three or all of them."""

    def __init__(self, folder: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(SIZE):
            here, there = spawn.Pipe()
            arguments = (rank, str(folder / "store"), there)
            process = spawn.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``job(process_group, *arguments)`` gives on each of the first ``size`` ranks."""
        for pipe in self._pipes[:size]:
            pipe.send((size, job, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes[:size]):
            if not pipe.poll(SECONDS):
                self.end()
                raise AssertionError(f"rank {rank} of {size} does not answer")
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def end(self) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.join()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=SECONDS),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(2, SIZE + 1)}
    while True:
        try:
            size, job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, job(groups[size], *arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
