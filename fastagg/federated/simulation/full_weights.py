"""The reference `full`: clients train all weights, and the server averages them.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data. AISTATS 2017, arXiv 1602.05629 (FederatedAveraging):

    W <- sum_k p_k W_k,     p_k = w_k / sum of w

or, with a server optimiser, W <- W + change(sum_k p_k W_k - W). Sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastagg.errors import InvalidInput
from fastagg.federated.clients.client import Client
from fastagg.federated.clients.placement import require_same_tensors
from fastagg.federated.messages import ClientFailure
from fastagg.federated.server.server import RoundOutcome, TooFewUpdates
from fastagg.federated.simulation.adapter_strategy import optimiser
from fastagg.federated.simulation.cohort import Cohort
from fastagg.federated.simulation.evaluation import Distance
from fastagg.federated.simulation.job import Trained
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.settings import FULL
from fastagg.whole_file import whole_file


class FullWeights:
    """A :class:`Strategy` without adapters. It holds one sum of weights, however many clients."""

    def __init__(self, cohort: Cohort) -> None:
        self.name = FULL
        self.trained: Sequence[Client] = cohort.clients
        self._examples = {client.name: len(client.train) for client in cohort.clients}
        self._cohort = cohort
        self._federation = cohort.config.federation
        self._optimiser = optimiser(self._federation)
        self._moments: dict[str, dict[str, Tensor]] = {}
        self._round = 1
        self._attempt = 0
        self._begin()

    def _begin(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._weight = 0
        self._heard: list[str] = []
        self._failures: list[ClientFailure] = []
        self._average: dict[str, Tensor] = {}

    def go_on_after(self, run: RunFolder, round: int) -> None:
        """See :class:`Strategy`. The weights come with the base."""
        self._round = round + 1
        self._moments = {}
        for name, tensor in load_file(run.round(round) / "state.safetensors").items():
            moment, _, weight = name.partition("/")
            self._moments.setdefault(weight, {})[moment] = tensor

    def start_round(self, clients: Sequence[str]) -> None:
        """See :class:`Strategy`."""
        self._attempt += 1
        self._begin()

    def receive(self, trained: Trained) -> str | None:
        """See :class:`Strategy`."""
        failure = trained.failure
        try:
            weights = self._checked(trained) if trained.update is not None else {}
        except InvalidInput as error:
            failure = str(error)
        if failure is not None:
            self._failures.append(ClientFailure(trained.client, self._round, failure))
            return failure
        examples = self._examples[trained.client]
        for name, weight in weights.items():
            if name not in self._sum:
                self._sum[name] = torch.zeros(weight.shape, dtype=torch.float64)
            self._sum[name].add_(weight.double(), alpha=examples)
        self._weight += examples
        self._heard.append(trained.client)
        return None

    def _checked(self, trained: Trained) -> dict[str, Tensor]:
        """The weights of an update, all of the model's and finite."""
        client = trained.client
        try:
            weights = load_file(str(trained.update))
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"the update cannot be read: {error}", client=client) from error
        own = dict(self._cohort.model.network.named_parameters())
        require_same_tensors(own, weights, field="weights", client=client)
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise InvalidInput("the weight is not finite", client=client, field=name)
        return weights

    def finish_round(self) -> bool:
        """See :class:`Strategy`."""
        needed = self._federation.min_clients
        if len(self._heard) < needed:
            if self._federation.on_too_few == "end":
                heard, failures = tuple(sorted(self._heard)), tuple(self._failures)
                outcome = RoundOutcome(self._round, self._attempt, None, heard, failures, 0.0)
                raise TooFewUpdates(outcome, needed)
            return False
        before = self._cohort.model.weights()
        moments = {}
        for name, summed in self._sum.items():
            gradient = summed.div_(self._weight).sub_(before[name])
            change, moments[name] = self._optimiser.step(gradient, self._moments.get(name, {}))
            self._average[name] = (before[name] + change).to(before[name].dtype)
        self._moments = moments
        self._sum = {}
        self._round, self._attempt = self._round + 1, 0
        return True

    def write(self, run: RunFolder, round: int) -> None:
        """See :class:`Strategy`."""
        flat = {
            f"{moment}/{name}": tensor
            for name, own in self._moments.items()
            for moment, tensor in own.items()
        }
        with whole_file(run.round(round) / "state.safetensors") as made:
            save_file(flat, made)
        with whole_file(run.weights(round)) as made:
            save_file(self._average, made)
        self._average = {}

    def as_handed(self, client: Client) -> AbstractContextManager[nn.Module]:
        """See :class:`Strategy`."""
        return nullcontext(self._cohort.model.network)

    def measured(self, run: RunFolder, round: int) -> Mapping[str, Distance | None]:
        """Nothing: every client is handed the average itself."""
        return {}

    def bytes_up(self, trained: Trained) -> int:
        """See :class:`Strategy`."""
        return trained.nbytes

    def bytes_down(self, client: str) -> int:
        """All weights, but for the first round, which every client has the base for."""
        if self._round == 1:
            return 0
        return sum(weight.nbytes for weight in self._cohort.model.network.parameters())
