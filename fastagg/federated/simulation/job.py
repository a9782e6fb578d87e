"""One client's part of a round, as a thing that any process can do from the run's folder alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from fastagg.adapter import Adapter
from fastagg.federated.clients.client import Client
from fastagg.federated.clients.local_model import LocalModel
from fastagg.federated.clients.training import Step, TrainingOutcome
from fastagg.federated.messages import ClientFailure, Handout
from fastagg.federated.simulation.cohort import Cohort
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.settings import CENTRALIZED, FULL
from fastagg.whole_file import whole_file

OnStep = Callable[[str, Step], None]


@dataclass(frozen=True)
class Job:
    """Train ``client`` for ``round`` of the run in ``folder``, which is of ``method``.

    timeout: seconds that it may take; 0 for any.
    """

    method: str
    client: str
    round: int
    folder: Path
    timeout: float = 0.0


@dataclass(frozen=True)
class Trained:
    """What became of a job.

    update: the adapter's folder or the file of weights; None where the client failed.
    nbytes: of its tensors.
    outcome: of the training, where there is an update.
    failure: why there is none.
    """

    client: str
    update: Path | None = None
    nbytes: int = 0
    outcome: TrainingOutcome | None = None
    failure: str | None = None


def perform(job: Job, cohort: Cohort, on_step: OnStep = lambda client, step: None) -> Trained:
    """Trains the client on this process' model, whose base weights become the round's."""
    run = RunFolder(job.folder)
    bring_to_round(cohort.model, run, job.round)
    client = member(job, cohort)
    told = _within(job, on_step)
    try:
        if job.method == FULL:
            update = run.update(job.round, f"{job.client}.safetensors")
            weights = client.fit_weights(job.round, told)
            with whole_file(update) as made:
                save_file(weights, made)
            nbytes = sum(weight.nbytes for weight in weights.values())
        else:
            update = run.update(job.round, job.client)
            nbytes = client.fit(handout(job, run), told, folder=update).adapter.nbytes
    except ClientFailure as error:
        return Trained(job.client, failure=error.reason)
    return Trained(job.client, update, nbytes, client.outcome)


def member(job: Job, cohort: Cohort) -> Client:
    """The client that a job is for."""
    return cohort.pooled if job.method == CENTRALIZED else cohort.by_name[job.client]


def handout(job: Job, run: RunFolder) -> Handout:
    """What the client begins the round with, as the last round left it."""
    if job.round == 1:
        return Handout(1)
    merged = run.merged(job.round - 1)
    if merged.exists():
        return Handout(job.round, Adapter.load(merged), merge=True)
    return Handout(job.round, Adapter.load(run.adapter(job.round - 1, job.client)))


def bring_to_round(model: LocalModel, run: RunFolder, round: int) -> None:
    """Makes the base weights what they are as a round begins, by all that was merged until then, or by
    the weights that the last round left. Where neither is, clients continue and the base stays."""
    if model.round == round:
        return
    if run.weights(round - 1).exists():
        model.set_weights(load_file(run.weights(round - 1)))
        model.round = round
    elif run.merged(round - 1).exists():
        for done in range(model.round, round):
            model.merge_for(done + 1, Adapter.load(run.merged(done)))


def _within(job: Job, on_step: OnStep) -> Callable[[Step], None]:
    started = time.perf_counter()

    def told(step: Step) -> None:
        on_step(job.client, step)
        if job.timeout and time.perf_counter() - started > job.timeout:
            raise ClientFailure(job.client, job.round, f"took longer than {job.timeout:g} s to train")

    return told
