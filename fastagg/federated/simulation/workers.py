"""Who trains the clients of a round: this process, or several others.

Both give the same results in the order of the jobs, whichever comes first. Bits depend on the number of
threads that a process computes with, so on the number of processes too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fastagg.errors import FastAggError
from fastagg.federated.clients.training import Step
from fastagg.federated.simulation.cohort import Cohort
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.job import Job, OnStep, Trained, perform
from fastagg.federated.simulation.preparation import Prepared
from fastagg.federated.simulation.quiet import quiet_libraries

__all__ = ["Train", "trainers"]

Train = Callable[[Sequence[Job], OnStep], Generator[Trained, None, None]]

Answer = Trained | Step | FastAggError | None
"""What a worker says: None as a client begins, the model being there, then its steps, then the end."""

# A client that is late says so at its next step. One that takes no steps any more is ended with its
# process, after this many seconds beyond its time.
GRACE = 30.0
# Seconds that a process may take to load the model, where clients have a time-out.
LOADING = 600.0


@contextmanager
def trainers(config: RunConfig, cohort: Cohort) -> Iterator[Train]:
    """What trains, for as long as the block lasts; processes begin with their first job."""
    if config.federation.workers == 1:

        def train(jobs: Sequence[Job], on_step: OnStep) -> Generator[Trained, None, None]:
            yield from (perform(job, cohort, on_step) for job in jobs)

        yield train
        return
    workers = [_Worker(config, cohort.prepared) for _ in range(config.federation.workers)]
    try:
        yield lambda jobs, on_step: _in_parallel(workers, jobs, on_step)
    finally:
        for worker in workers:
            worker.end()


def _in_parallel(
    workers: Sequence[_Worker], jobs: Sequence[Job], on_step: OnStep
) -> Generator[Trained, None, None]:
    """Each job to the next worker that is free. If it is left early, busy workers are ended."""
    waiting, done = deque(jobs), dict[str, Trained]()
    try:
        for job in jobs:
            while job.client not in done:
                for worker in workers:
                    if waiting and worker.job is None:
                        worker.give(waiting.popleft())
                for trained in _answers([w for w in workers if w.job is not None], on_step):
                    done[trained.client] = trained
            yield done.pop(job.client)
    finally:
        for worker in workers:
            if worker.job is not None:
                worker.end()


def _answers(busy: Sequence[_Worker], on_step: OnStep) -> Iterator[Trained]:
    """Waits until some worker says something, or is late."""
    limits = [left for worker in busy if (left := worker.patience()) is not None]
    ready = wait([worker.connection for worker in busy], min(limits, default=None))
    for worker in busy:
        if worker.connection in ready:
            answer = worker.answer()
            if isinstance(answer, Trained):
                yield answer
            elif isinstance(answer, FastAggError):
                raise answer
            elif isinstance(answer, Step) and worker.job is not None:
                on_step(worker.job.client, answer)
        elif worker.patience() == 0:
            yield worker.give_up("took no step any more, and its process was ended")


class _Worker:
    """A process with a model of its own."""

    connection: Connection

    def __init__(self, config: RunConfig, prepared: Prepared) -> None:
        self._config = config
        self._prepared = prepared
        self._process: Any = None
        self._deadline: float | None = None
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        if self._process is None or not self._process.is_alive():
            self.end()
            self._begin()
        self.job = job
        # Loading the model is not the client's time, but a process that hangs there has to be noticed.
        self._deadline = time.monotonic() + LOADING + job.timeout if job.timeout else None
        with suppress(ConnectionError):  # its answer tells that it is gone
            self.connection.send(job)

    def answer(self) -> Answer:
        """What it says. A process that is gone, killed perhaps, has failed its client alone."""
        try:
            answer: Answer = self.connection.recv()
        except (EOFError, OSError):  # also in the middle of a message
            self._process.join()
            return self.give_up(f"its process ended with exit code {self._process.exitcode}")
        if isinstance(answer, (Trained, FastAggError)):
            self.job = None
        elif self.job is not None and self.job.timeout:
            self._deadline = time.monotonic() + self.job.timeout + GRACE
        return answer

    def patience(self) -> float | None:
        """Seconds until it is late; 0 where it is, None where it may take any time."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def give_up(self, reason: str) -> Trained:
        assert self.job is not None
        failed = Trained(self.job.client, failure=reason)
        self.end()
        return failed

    def end(self) -> None:
        """Ends the process, whatever it does. The next job begins another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.connection.close()
        self._process, self.job = None, None

    def _begin(self) -> None:
        # A fork would share the locks of torch's threads, and cannot use a GPU.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        threads = max(1, (os.cpu_count() or 1) // self._config.federation.workers)
        self._process = context.Process(
            target=_serve, args=(theirs, self._config, self._prepared, threads), daemon=True
        )
        self._process.start()
        theirs.close()


def _serve(connection: Connection, config: RunConfig, prepared: Prepared, threads: int) -> None:
    """A worker's life: jobs come in, steps and results go out, until the other end is closed."""
    # Ctrl-C goes to every process of a terminal; the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_libraries()
    torch.set_num_threads(threads)
    cohort = method = None
    with suppress(EOFError, ConnectionError):
        while True:
            job = connection.recv()
            try:
                cohort = cohort or Cohort.open(config, prepared)
                if method != job.method:
                    cohort.restart()
                method = job.method
                connection.send(None)
                answer: Answer = perform(job, cohort, lambda client, step: connection.send(step))
            except FastAggError as error:
                answer = error
            except (EOFError, ConnectionError):  # nobody listens any more
                raise
            except Exception as error:
                answer = FastAggError(f"a worker failed: {type(error).__name__}: {error}")
            connection.send(answer)
