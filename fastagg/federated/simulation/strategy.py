"""How one method's rounds are run, whatever trains the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from fastagg.federated.clients.client import Client
from fastagg.federated.simulation.evaluation import Distance
from fastagg.federated.simulation.job import Trained
from fastagg.federated.simulation.run_folder import RunFolder


class Strategy(Protocol):
    """What a method's server does in a round.

    name: the method's.
    trained: the clients that train, in order. All clients of the cohort are evaluated, these or others.
    """

    name: str
    trained: Sequence[Client]

    def go_on_after(self, run: RunFolder, round: int) -> None:
        """Becomes what it was after a complete round."""

    def start_round(self, clients: Sequence[str]) -> None:
        """Begins a round, or its next attempt."""

    def receive(self, trained: Trained) -> str | None:
        """Takes an update in, or a failure; says why where it has no use for the update."""

    def finish_round(self) -> bool:
        """Makes of the round's updates what the next one begins with; False where it is to be repeated.

        Raises:
            TooFewUpdates: where it is not.
        """

    def write(self, run: RunFolder, round: int) -> None:
        """Leaves in the run's folder what the next round begins with, and its own state."""

    def as_handed(self, client: Client) -> AbstractContextManager[nn.Module]:
        """The model as a client of the cohort begins the next round with it; the base is the round's."""

    def measured(self, run: RunFolder, round: int) -> Mapping[str, Distance | None]:
        """Client -> how far what it is handed is from dW, the exact sum of the round's updates, or from
        what a server optimiser makes of it. Leaves the updates' similarity and the spectra of dW."""

    def bytes_up(self, trained: Trained) -> int:
        """Of what a client sent."""

    def bytes_down(self, client: str) -> int:
        """Of what a client is handed for the round that begins, or comes next."""
