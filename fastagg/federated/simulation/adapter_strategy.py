"""The package's methods: a Server of adapters, and all that a simulation records of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from torch import nn

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput
from fastagg.federated.clients.client import Client
from fastagg.federated.seeds import seed_of
from fastagg.federated.server.server import Server
from fastagg.federated.server.server_optimisers import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimiser,
)
from fastagg.federated.simulation import evaluation
from fastagg.federated.simulation.cohort import POOLED, Cohort
from fastagg.federated.simulation.evaluation import Distance
from fastagg.federated.simulation.job import Trained
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.settings import CENTRALIZED, FederationSection
from fastagg.update import ClientUpdate
from fastagg.whole_file import write_whole
from fastagg.whole_round import aggregate


class AdapterStrategy:
    """A method of :mod:`fastagg.methods`.

    Args:
        name: what the run calls it.
        method: the package's.
        trained: the clients that train.
        min_clients: updates without which a round does not count.
        own_optimiser: the server's; None: the configuration's.

    Raises:
        InvalidInput: clients that the method cannot aggregate together.
    """

    def __init__(
        self,
        name: str,
        method: str,
        trained: Sequence[Client],
        min_clients: int,
        cohort: Cohort,
        own_optimiser: ServerOptimiser | None = None,
    ) -> None:
        self.name = name
        self.trained = trained
        self._by_name = {client.name: client for client in trained}
        self._cohort = cohort
        federation = cohort.config.federation
        self._server = Server(
            method,
            {client.name: cohort.fresh[client.name] for client in trained},
            optimiser=own_optimiser or optimiser(federation),
            min_clients=min_clients,
            on_too_few=federation.on_too_few,
            seed=seed_of(cohort.config.seed, "server") % 2**31,
            device="cuda" if cohort.model.device.type == "cuda" else "cpu",
        )
        self._updates: list[ClientUpdate] = []

    @property
    def _merging(self) -> bool:
        return not self._server.method.handout.ranked

    def go_on_after(self, run: RunFolder, round: int) -> None:
        """See :class:`Strategy`."""
        self._server.load(run.round(round) / "state.safetensors")

    def start_round(self, clients: Sequence[str]) -> None:
        """See :class:`Strategy`."""
        self._updates = []
        self._server.start_round(clients)

    def receive(self, trained: Trained) -> str | None:
        """See :class:`Strategy`."""
        if trained.update is None:
            self._server.fail(trained.client, trained.failure or "has no update")
            return trained.failure
        examples = len(self._by_name[trained.client].train)
        try:
            update = ClientUpdate.load(trained.update, weight=examples, client_id=trained.client)
        except InvalidInput as error:
            self._server.fail(trained.client, str(error))
            return str(error)
        refused = self._server.receive(update)
        if refused is not None:
            return refused.reason
        self._updates.append(update)
        return None

    def finish_round(self) -> bool:
        """See :class:`Strategy`."""
        return self._server.finish_round().aggregate is not None

    def write(self, run: RunFolder, round: int) -> None:
        """See :class:`Strategy`."""
        self._server.save(run.round(round) / "state.safetensors")
        if self._merging:
            self._handed(self.trained[0].name).save(run.merged(round))
            return
        written: dict[int, Path] = {}
        for client in self.trained:
            adapter, folder = self._handed(client.name), run.adapter(round, client.name)
            same = written.setdefault(adapter.flat.data_ptr(), folder)
            if same is folder:
                adapter.save(folder)
            else:
                # Clients of one configuration are handed the same: one copy serves them all.
                shutil.copytree(same, folder, copy_function=_link)

    def as_handed(self, client: Client) -> AbstractContextManager[nn.Module]:
        """See :class:`Strategy`."""
        return self._as_handed(client.name)

    @contextmanager
    def _as_handed(self, client: str) -> Iterator[nn.Module]:
        adapter = self._adapter(client)
        if adapter is None or self._merging:  # not trained yet, or in the base already
            yield self._cohort.model.network
        else:
            with self._cohort.model.adapter(adapter) as network:
                yield network

    def measured(self, run: RunFolder, round: int) -> Mapping[str, Distance | None]:
        """See :class:`Strategy`."""
        wanted, updates = self._cohort.config.evaluation, self._updates
        self._updates = []  # what is mapped keeps its place on the disk, also when it is removed
        compared = updates[: wanted.similarity]
        if compared:
            names = [update.client_id for update in compared]
            table = {"clients": names, "cosine": evaluation.similarity(compared)}
            write_whole(run.round(round) / "similarity.json", json.dumps(table))
        if not wanted.distance:
            return {}
        handed = {client.name: self._handed(client.name) for client in self.trained}
        # Whatever the method makes of them, what it approximates is the exact sum of the updates.
        exact = aggregate(updates, "flexlora")

        def held(module: str) -> evaluation.Delta:
            if not self._server.optimiser.dense:
                return exact.factors(module) or exact.delta(module)
            if self._merging:  # the optimiser's change, which all are handed
                return handed[self.trained[0].name].delta(module)
            return self._server.delta(module)

        spectra, distances = evaluation.compare(exact.modules, held, handed)
        write_whole(run.round(round) / "spectra.json", json.dumps({"modules": spectra}))
        return distances

    def bytes_up(self, trained: Trained) -> int:
        """See :class:`Strategy`."""
        return trained.nbytes

    def bytes_down(self, client: str) -> int:
        """See :class:`Strategy`."""
        adapter = self._adapter(client)
        return adapter.nbytes if adapter else 0

    def _adapter(self, client: str) -> Adapter | None:
        return self._server.handout(client).adapter

    def _handed(self, client: str) -> Adapter:
        adapter = self._adapter(client)
        assert adapter is not None, "asked after a round"
        return adapter


class Centralized(AdapterStrategy):
    """A reference: one client with the examples of all, that takes as many steps as a round's clients
    together, with the largest of their adapters. The mean of one is itself: nothing is rounded."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(CENTRALIZED, "fedit", (cohort.pooled,), 1, cohort, FedAvg())

    def as_handed(self, client: Client) -> AbstractContextManager[nn.Module]:
        """See :class:`Strategy`."""
        return self._as_handed(POOLED)

    def measured(self, run: RunFolder, round: int) -> Mapping[str, Distance | None]:
        """Nothing: what it is handed is what it sent."""
        return {}

    def bytes_up(self, trained: Trained) -> int:
        """Nothing is sent."""
        return 0

    def bytes_down(self, client: str) -> int:
        """Nothing is sent."""
        return 0


def optimiser(wanted: FederationSection) -> ServerOptimiser:
    """The server's optimiser of a configuration."""
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


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without them
        shutil.copyfile(source, target)
