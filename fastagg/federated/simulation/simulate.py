"""All rounds of a run: each method in turn, on the same clients, first adapters and batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fastagg.errors import FastAggError
from fastagg.federated.clients.client import Client
from fastagg.federated.clients.token_loss import loss_on
from fastagg.federated.clients.training import Step
from fastagg.federated.seeds import seed_of
from fastagg.federated.simulation import evaluation
from fastagg.federated.simulation.adapter_strategy import AdapterStrategy, Centralized
from fastagg.federated.simulation.cohort import Cohort, participants
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.events import (
    ClientFinished,
    ClientStep,
    Observer,
    PreTrainingStep,
    RoundFinished,
    RoundStarted,
    RunStarted,
)
from fastagg.federated.simulation.full_weights import FullWeights
from fastagg.federated.simulation.job import Job, Trained, bring_to_round
from fastagg.federated.simulation.metrics_lines import ClientRecord, RoundRecord
from fastagg.federated.simulation.preparation import all_or_nothing, locked, prepare
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.settings import CENTRALIZED, FULL
from fastagg.federated.simulation.strategy import Strategy
from fastagg.federated.simulation.workers import Train, trainers
from fastagg.whole_file import write_whole

MOST_ATTEMPTS = 10  # training repeats bit for bit: a round of the same clients would fail for ever


def simulate(
    config: RunConfig,
    *,
    resume: bool = False,
    observer: Observer = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs every method into a folder of its own, ``output.folder/METHOD``.

    A run that goes on from its last complete round has the bits that it would have had, in adapters
    and metrics (but for times), on the same machine and software. With ``federation.workers`` above 1
    other processes train, which import the caller's main module: guard it as multiprocessing asks.

    Args:
        resume: go on with what is in the folders; without, they have to be empty or not there.
        observer: is told what happens.
        stop: asked before and after each client, and as the embedded model is trained. Once true, the
            round in progress is given up, unless all of its clients have trained.

    Returns:
        Whether all rounds are complete: False where ``stop`` ended it.

    Raises:
        InvalidInput: settings that do not fit each other, the data or the model.
        TooFewUpdates: see ``federation.min_clients``.
    """
    try:
        with locked(Path(config.output.folder)):
            return _simulate(config, resume, observer, stop)
    except _Stopped:
        return False


class _Stopped(Exception):
    """Asked to end before the first round."""


def _simulate(
    config: RunConfig, resume: bool, observer: Observer, stop: Callable[[], bool]
) -> bool:
    out = Path(config.output.folder)
    methods = config.federation.methods
    runs = {method: (_alone(config, method), RunFolder(out / method)) for method in methods}
    for own, folder in runs.values():
        folder.check(own, resume=resume)

    def told(step: int, steps: int) -> None:
        observer(PreTrainingStep(step, steps))
        if stop():
            raise _Stopped

    with all_or_nothing(out / "cohort"):
        prepared = prepare(config, out / "cohort", told)
        cohort = Cohort.open(config, prepared)
        # All are made first: a method that refuses the clients is heard of before any has trained.
        strategies = [strategy_of(method, cohort) for method in runs]
    with trainers(config, cohort) as train:
        for strategy in strategies:
            if stop():
                return False
            own, folder = runs[strategy.name]
            cohort.restart()
            run = _Run(own, cohort, strategy, folder, train, observer, stop)
            if not run.all_rounds(folder.open(own, resume=resume)):
                return False
    return True


def strategy_of(method: str, cohort: Cohort) -> Strategy:
    """How a method of a run is run.

    Raises:
        InvalidInput: clients that the method cannot aggregate together.
    """
    if method == FULL:
        return FullWeights(cohort)
    if method == CENTRALIZED:
        return Centralized(cohort)
    least = cohort.config.federation.min_clients
    return AdapterStrategy(method, method, cohort.clients, least, cohort)


def _alone(config: RunConfig, method: str) -> RunConfig:
    federation = config.federation.model_copy(update={"methods": (method,)})
    return config.model_copy(update={"federation": federation})


class _Run:
    """One method's rounds."""

    def __init__(
        self,
        config: RunConfig,
        cohort: Cohort,
        strategy: Strategy,
        folder: RunFolder,
        train: Train,
        observer: Observer,
        stop: Callable[[], bool],
    ) -> None:
        self.config = config
        self.cohort = cohort
        self.strategy = strategy
        self.folder = folder
        self.train = train
        self.observer = observer
        self.stop = stop

    def all_rounds(self, done: int) -> bool:
        names = tuple(client.name for client in self.cohort.clients)
        rounds = self.config.federation.rounds
        self.observer(RunStarted(self.strategy.name, rounds, names, done))
        if done:
            self.strategy.go_on_after(self.folder, done)
            bring_to_round(self.cohort.model, self.folder, done + 1)
        else:
            record = self._new_record(0)
            self._evaluate(record)
            self._complete(record)
        return all(self._round(number) for number in range(done + 1, rounds + 1))

    def _round(self, number: int) -> bool:
        """One round, repeated until it counts; False where it was stopped."""
        if self.stop():
            return False
        record = self._new_record(number)
        for attempt in range(1, MOST_ATTEMPTS + 1):
            if not self._train(record, attempt):
                return False
            with record.clock("aggregate"):
                counts = self.strategy.finish_round()
            if counts:
                self._hand_out(record)
                return True
        raise FastAggError(
            f"round {number} had too few updates in {MOST_ATTEMPTS} attempts: lower "
            "federation.min_clients, or look at why clients fail"
        )

    def _train(self, record: RoundRecord, attempt: int) -> bool:
        """The round's clients train, and the strategy has their updates; False where it was stopped with
        clients still to come."""
        number = record.round
        chosen = self._participants(number, attempt)
        self.strategy.start_round(chosen)
        self.folder.begin_round(number)
        self.observer(RoundStarted(number, chosen))
        for client in record.clients.values():
            client.outcome, client.bytes_up = None, 0
        wanted = self.config.federation
        # A client's time is no measure for the one that does the work of all.
        timeout = 0.0 if self.strategy.name == CENTRALIZED else wanted.timeout
        jobs = [Job(self.strategy.name, name, number, self.folder.path, timeout) for name in chosen]
        left = len(jobs)
        results = self.train(jobs, lambda client, step: self._stepped(number, client, step))
        try:
            while True:
                with record.clock("train"):
                    trained = next(results, None)
                if trained is None:
                    return True
                self._receive(record, trained)
                left -= 1
                if left and self.stop():
                    return False
        finally:
            results.close()

    def _participants(self, number: int, attempt: int) -> tuple[str, ...]:
        """Those drawn for a round, in the order of the clients."""
        names = [client.name for client in self.strategy.trained]
        count = participants(self.config.federation, len(names))
        draw = np.random.default_rng(seed_of(self.config.seed, "participants", number, attempt))
        return tuple(names[i] for i in sorted(draw.choice(len(names), count, replace=False).tolist()))

    def _stepped(self, number: int, client: str, step: Step) -> None:
        self.observer(ClientStep(number, client, step.step, step.steps, step.loss))

    def _receive(self, record: RoundRecord, trained: Trained) -> None:
        with record.clock("aggregate"):
            failure = self.strategy.receive(trained)
        if failure is None:
            own = record.clients[trained.client]
            own.outcome, own.bytes_up = trained.outcome, self.strategy.bytes_up(trained)
        else:
            record.failures[trained.client] = failure
        loss = trained.outcome.loss if trained.outcome else None
        self.observer(ClientFinished(record.round, trained.client, loss, failure))

    def _hand_out(self, record: RoundRecord) -> None:
        """Writes what the next round begins with, and measures it."""
        number, wanted = record.round, self.config.evaluation
        self._write_weights(record)
        self.strategy.write(self.folder, number)
        with record.clock("aggregate"):
            bring_to_round(self.cohort.model, self.folder, number + 1)
        with record.clock("evaluate"):
            for name, distance in self.strategy.measured(self.folder, number).items():
                record.clients[name].distance = distance
        if number % wanted.every == 0 or number == self.config.federation.rounds:
            self._evaluate(record)
        self._complete(record)
        if self.config.output.keep == "last":
            self.folder.forget_updates(number)
            self.folder.forget_state(number - 1)

    def _write_weights(self, record: RoundRecord) -> None:
        """What `fastagg aggregate --weights` takes beside the round's updates."""
        examples = {client.name: len(client.train) for client in self.strategy.trained}
        counted = {own.name: examples[own.name] for own in record.clients.values() if own.outcome}
        write_whole(self.folder.round(record.round) / "weights.json", json.dumps(counted))

    def _evaluate(self, record: RoundRecord) -> None:
        """Each client's held-out examples under what it was handed last."""
        wanted, scores = self.config.evaluation, []
        with record.clock("evaluate"):
            for client in self.cohort.clients:
                held_out = client.held_out[: wanted.max_examples or None]
                with self.strategy.as_handed(client) as network:
                    record.clients[client.name].held_out = loss_on(network, held_out, batch=wanted.batch)
                    if wanted.answers:
                        scores += evaluation.score(
                            network,
                            self.cohort.questions[client.name],
                            self.config.data.prompt_template(),
                            self.cohort.tokeniser,
                            length=self.config.data.length,
                            new_tokens=wanted.new_tokens,
                        )
        record.answers = evaluation.mean_answers(scores)

    def _new_record(self, number: int) -> RoundRecord:
        known: Mapping[str, Client] = {
            client.name: client for client in (*self.cohort.clients, *self.strategy.trained)
        }
        clients = {
            name: ClientRecord(
                name,
                None if self.strategy.name == FULL else client.config.r,
                bytes_down=self.strategy.bytes_down(name) if number else 0,
            )
            for name, client in known.items()
        }
        answers = self.config.evaluation.answers
        return RoundRecord(self.strategy.name, number, clients, scored=answers)

    def _complete(self, record: RoundRecord) -> None:
        lines = record.lines()
        self.folder.complete_round(record.round, lines)
        self.observer(RoundFinished(record.round, lines[0], tuple(lines[1:])))
