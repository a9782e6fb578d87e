"""All rounds of a run in one process: each method in turn, on the same clients, first adapters and
batches."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastagg.adapter import Adapter
from fastagg.errors import FastAggError, InvalidInput
from fastagg.federated.clients.client import Client
from fastagg.federated.clients.token_loss import TokenLoss, loss_on
from fastagg.federated.clients.training import Step
from fastagg.federated.messages import ClientFailure
from fastagg.federated.seeds import seed_of
from fastagg.federated.server.server import RoundOutcome, Server
from fastagg.federated.server.server_optimisers import FedAdam, FedAvg, FedAvgM, FedYogi, ServerOptimiser
from fastagg.federated.simulation import evaluation
from fastagg.federated.simulation.cohort import Cohort
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.evaluation import Answers, Distance
from fastagg.federated.simulation.events import (
    ClientFinished,
    ClientStep,
    Observer,
    RoundFinished,
    RoundStarted,
    RunStarted,
)
from fastagg.federated.simulation.run_folder import Line, RunFolder, write_whole
from fastagg.federated.simulation.settings import REFERENCES
from fastagg.update import ClientUpdate

MOST_ATTEMPTS = 10  # training repeats bit for bit: a round of the same clients would fail for ever

# Where clients merge, the adapters of all rounds are the model, whatever else is kept.
MERGED = "merged"


def simulate(
    config: RunConfig,
    *,
    resume: bool = False,
    observer: Observer = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs every method into a folder of its own, ``output.folder/METHOD``.

    A run that goes on from its last complete round has the bits that it would have had, in adapters
    and metrics (but for times), on the same machine and software.

    Args:
        resume: go on with what is in the folders; without, they have to be empty or not there.
        observer: is told what happens.
        stop: asked after each client; once true, the round in progress is given up.

    Returns:
        Whether all rounds are complete: False where ``stop`` ended it.

    Raises:
        InvalidInput: settings that do not fit each other, the data or the model.
        TooFewUpdates: see ``federation.min_clients``.
    """
    _check_simulated(config)
    cohort = Cohort.of(config)
    before = cohort.model.weights()
    methods = config.federation.methods
    # All are made first: a method that refuses the clients is heard of before any has trained.
    servers = {method: _server(method, config, cohort) for method in methods}
    for method, server in servers.items():
        cohort.model.set_weights(before)
        cohort.model.round = 1
        own = config.model_copy(
            update={"federation": config.federation.model_copy(update={"methods": (method,)})}
        )
        folder = RunFolder(Path(config.output.folder) / method)
        run = _Run(own, cohort, server, folder, observer, stop)
        if not run.all_rounds(folder.open(own, resume=resume)):
            return False
    return True


class _Run:
    """One method's rounds."""

    def __init__(
        self,
        config: RunConfig,
        cohort: Cohort,
        server: Server,
        folder: RunFolder,
        observer: Observer,
        stop: Callable[[], bool],
    ) -> None:
        self.config = config
        self.cohort = cohort
        self.server = server
        self.folder = folder
        self.observer = observer
        self.stop = stop
        self.merging = not server.method.handout.ranked

    def all_rounds(self, done: int) -> bool:
        names = tuple(client.name for client in self.cohort.clients)
        rounds = self.config.federation.rounds
        self.observer(RunStarted(self.server.method.name, rounds, names, done))
        if done:
            self._go_on_after(done)
        else:
            self._before_training()
        return all(self._round(number) for number in range(done + 1, rounds + 1))

    def _go_on_after(self, done: int) -> None:
        """The server and, by merging again what was merged, the base as they were after a round."""
        self.server.load(self.folder.round(done) / "state.safetensors")
        if self.merging:
            for number in range(1, done + 1):
                merged = Adapter.load(self.folder.round(number) / "adapters" / MERGED)
                self.cohort.model.merge_for(number + 1, merged)

    def _before_training(self) -> None:
        clock = _Clock()
        with clock("evaluate"):
            losses, answers = self._evaluate()
        line = self._round_line(0, losses, answers, None, clock)
        clients = [
            self._client_line(0, client, held_out_loss=_finite(loss.mean))
            for client, loss in zip(self.cohort.clients, losses, strict=True)
        ]
        self.folder.complete_round(0, [line, *clients])
        self.observer(RoundFinished(0, line, clients))

    def _round(self, number: int) -> bool:
        """One round, repeated until it counts; False where it was stopped."""
        clock = _Clock()
        for attempt in range(1, MOST_ATTEMPTS + 1):
            updates = self._train(number, attempt, clock)
            if updates is None:
                return False
            downs = {client.name: self._bytes_down(client) for client in self.cohort.clients}
            with clock("aggregate"):
                outcome = self.server.finish_round()
            if outcome.aggregate is not None:
                self._complete(outcome, updates, downs, clock)
                return True
        raise FastAggError(
            f"round {number} had too few updates in {MOST_ATTEMPTS} attempts: lower "
            "federation.min_clients, or look at why clients fail"
        )

    def _train(self, number: int, attempt: int, clock: _Clock) -> list[ClientUpdate] | None:
        """The updates of those that have one, in the order of the clients; None where it was stopped."""
        chosen = _participants(self.config, self.cohort.clients, number, attempt)
        names = tuple(client.name for client in chosen)
        self.server.start_round(names)
        self.observer(RoundStarted(number, names))
        updates = []
        for client in chosen:
            handout = self.server.handout(client.name)
            loss = failure = None
            try:
                with clock("train"):
                    update = client.fit(handout, self._on_step(client.name, number))
            except ClientFailure as error:
                failure = error.reason
                self.server.fail(client.name, failure)
            else:
                with clock("aggregate"):
                    refused = self.server.receive(update)
                if refused is None:
                    updates.append(update)
                failure = refused.reason if refused else None
                loss = client.outcome.loss if client.outcome else None
            self.observer(ClientFinished(number, client.name, loss, failure))
            if self.stop():
                return None
        return updates

    def _on_step(self, client: str, number: int) -> Callable[[Step], None]:
        allowed = self.config.federation.timeout
        started = time.perf_counter()

        def told(step: Step) -> None:
            self.observer(ClientStep(number, client, step.step, step.steps, step.loss))
            if allowed and time.perf_counter() - started > allowed:
                raise ClientFailure(client, number, f"took longer than {allowed:g} s to train")

        return told

    def _complete(
        self,
        outcome: RoundOutcome,
        updates: Sequence[ClientUpdate],
        downs: dict[str, int],
        clock: _Clock,
    ) -> None:
        number, folder = outcome.round, self.folder.begin_round(outcome.round)
        rounds, every = self.config.federation.rounds, self.config.evaluation.every
        handed = self._handed_out()
        if self.merging:
            with clock("aggregate"):
                self.cohort.model.merge_for(number + 1, handed[MERGED])
        losses: list[TokenLoss] | None = None
        answers = None
        with clock("evaluate"):
            if number % every == 0 or number == rounds:
                losses, answers = self._evaluate()
            distances = self._distances(outcome, folder, handed)
            _write_similarity(folder, updates)
        self.server.save(folder / "state.safetensors")
        for name, adapter in handed.items():
            adapter.save(folder / "adapters" / name)
        line = self._round_line(number, losses, answers, outcome, clock, downs, updates)
        clients = [*self._client_lines(number, losses, distances, downs, updates)]
        self.folder.complete_round(number, [line, *clients])
        if self.config.output.keep == "last" and number > 1 and not self.merging:
            self.folder.forget_adapters(number - 1)
        self.observer(RoundFinished(number, line, clients))

    def _handed_out(self) -> dict[str, Adapter]:
        """What the next round begins with, by client; the one adapter that all merge as MERGED."""
        found = {}
        for client in self.cohort.clients[: 1 if self.merging else None]:
            adapter = self.server.handout(client.name).adapter
            if adapter is not None:
                found[MERGED if self.merging else client.name] = adapter
        return found

    def _evaluate(self) -> tuple[list[TokenLoss], Answers | None]:
        """Each client's held-out examples under what it was handed last: one loss a client, and the
        answers' means over all."""
        wanted = self.config.evaluation
        losses, scores = [], []
        for client in self.cohort.clients:
            held_out = client.held_out[: wanted.max_examples or None]
            with self._as_handed(client) as network:
                losses.append(loss_on(network, held_out, batch=wanted.batch))
                if wanted.answers:
                    scores += evaluation.score(
                        network,
                        self.cohort.questions[client.name],
                        self.config.data.prompt_template(),
                        self.cohort.tokeniser,
                        length=self.config.data.length,
                        new_tokens=wanted.new_tokens,
                    )
        return losses, evaluation.mean_answers(scores)

    @contextmanager
    def _as_handed(self, client: Client) -> Iterator[nn.Module]:
        """The model as a client begins the next round with it."""
        adapter = None if self.merging else self.server.handout(client.name).adapter
        if adapter is None:  # merged already, or not trained yet
            yield self.cohort.model.network
        else:
            with self.cohort.model.adapter(adapter) as network:
                yield network

    def _distances(
        self, outcome: RoundOutcome, folder: Path, handed: dict[str, Adapter]
    ) -> dict[str, Distance | None]:
        """Of what each client is handed from the sum that the server holds; writes its spectra."""
        aggregate = outcome.aggregate
        if not self.config.evaluation.distance or aggregate is None:
            return {}
        whole = handed.get(MERGED)
        kept = not self.merging and self.server.optimiser.dense
        delta: Callable[[str], torch.Tensor] = self.server.delta if kept else aggregate.delta
        if whole is not None:
            delta = whole.delta
        values = evaluation.spectra(aggregate.modules, delta)
        spectra = {"modules": {name: falling.tolist() for name, falling in values.items()}}
        write_whole(folder / "spectra.json", json.dumps(spectra))
        # Clients of one configuration are handed the same memory, and where they merge, all are.
        measured = {
            each.flat.data_ptr(): evaluation.distance(each, delta, values) for each in _distinct(handed)
        }
        return {
            name: measured[handed[MERGED if self.merging else name].flat.data_ptr()]
            for name in self.server.clients
        }

    def _bytes_down(self, client: Client) -> int:
        adapter = self.server.handout(client.name).adapter
        return adapter.nbytes if adapter else 0

    def _round_line(
        self,
        number: int,
        losses: Sequence[TokenLoss] | None,
        answers: Answers | None,
        outcome: RoundOutcome | None,
        clock: _Clock,
        downs: dict[str, int] | None = None,
        updates: Sequence[ClientUpdate] = (),
    ) -> Line:
        whole = evaluation.together(losses) if losses is not None else TokenLoss(0.0, 0)
        scored = self.config.evaluation.answers
        return {
            "kind": "round",
            "method": self.server.method.name,
            "round": number,
            "loss": _finite(whole.mean),
            "perplexity": _finite(evaluation.perplexity(whole)),
            "participants": len(outcome.participants) if outcome else 0,
            "failures": {each.client: each.reason for each in outcome.failures} if outcome else {},
            "exact_match": answers.exact_match if answers and "exact-match" in scored else None,
            "rouge_l": answers.rouge_l if answers and "rouge-l" in scored else None,
            "seconds": clock.seconds(),
            "bytes_up": sum(update.adapter.nbytes for update in updates),
            "bytes_down": sum((downs or {}).values()),
        }

    def _client_lines(
        self,
        number: int,
        losses: Sequence[TokenLoss] | None,
        distances: dict[str, Distance | None],
        downs: dict[str, int],
        updates: Sequence[ClientUpdate],
    ) -> Iterator[Line]:
        up = {update.client_id: update.adapter.nbytes for update in updates}
        for place, client in enumerate(self.cohort.clients):
            took_part = client.name in up
            trained = client.outcome if took_part else None
            distance = distances.get(client.name)
            yield self._client_line(
                number,
                client,
                participated=took_part,
                train_loss=_finite(trained.loss) if trained else None,
                steps=trained.steps if trained else 0,
                held_out_loss=_finite(losses[place].mean) if losses is not None else None,
                distance=distance.received if distance else None,
                optimal_distance=distance.optimal if distance else None,
                bytes_up=up.get(client.name, 0),
                bytes_down=downs[client.name],
                train_seconds=trained.seconds if trained else 0.0,
            )

    def _client_line(self, number: int, client: Client, **measured: object) -> Line:
        return {
            "kind": "client",
            "method": self.server.method.name,
            "round": number,
            "client": client.name,
            "rank": client.config.r,
            "participated": False,
            "train_loss": None,
            "steps": 0,
            "held_out_loss": None,
            "distance": None,
            "optimal_distance": None,
            "bytes_up": 0,
            "bytes_down": 0,
            "train_seconds": 0.0,
        } | measured


class _Clock:
    """Seconds by what they were spent on, since it was made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._spent = dict.fromkeys(("train", "aggregate", "evaluate"), 0.0)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        whole = time.perf_counter() - self._begun
        return self._spent | {"other": whole - sum(self._spent.values())}


def _check_simulated(config: RunConfig) -> None:
    wanted = config.federation
    references = [method for method in wanted.methods if method in REFERENCES]
    if references:
        raise InvalidInput(
            "no federated method of adapters, so it cannot be simulated by rounds of them",
            field="federation.methods",
            got=references[0],
            cure="Leave it out",
        )
    if wanted.workers != 1:
        raise InvalidInput(
            "a simulation trains its clients one after the other, in one process",
            field="federation.workers",
            expected=1,
            got=wanted.workers,
        )


def _server(method: str, config: RunConfig, cohort: Cohort) -> Server:
    wanted = config.federation
    return Server(
        method,
        cohort.fresh,
        optimiser=_optimiser(config),
        min_clients=wanted.min_clients,
        on_too_few=wanted.on_too_few,
        seed=seed_of(config.seed, "server") % 2**31,
        device="cuda" if cohort.model.device.type == "cuda" else "cpu",
    )


def _optimiser(config: RunConfig) -> ServerOptimiser:
    wanted = config.federation
    rate = wanted.server_learning_rate
    match wanted.optimiser:
        case "fedavg":
            return FedAvg()
        case "fedavgm":
            return FedAvgM(rate, wanted.beta1)
        case "fedadam":
            return FedAdam(rate, wanted.beta1, wanted.beta2, wanted.tau)
        case "fedyogi":
            return FedYogi(rate, wanted.beta1, wanted.beta2, wanted.tau)


def _participants(
    config: RunConfig, clients: Sequence[Client], number: int, attempt: int
) -> list[Client]:
    """Those drawn for a round, in the order of the clients."""
    wanted = config.federation
    count = wanted.clients_per_round or max(1, round(wanted.participation * len(clients)))
    count = min(max(count, wanted.min_clients), len(clients))
    draw = np.random.default_rng(seed_of(config.seed, "participants", number, attempt))
    return [clients[i] for i in sorted(draw.choice(len(clients), count, replace=False).tolist())]


def _write_similarity(folder: Path, updates: Sequence[ClientUpdate]) -> None:
    names = [update.client_id for update in updates]
    table = {"clients": names, "cosine": evaluation.similarity(updates)}
    write_whole(folder / "similarity.json", json.dumps(table))


def _distinct(adapters: Mapping[str, Adapter]) -> Iterable[Adapter]:
    """Each buffer's adapter once."""
    return {adapter.flat.data_ptr(): adapter for adapter in adapters.values()}.values()


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
