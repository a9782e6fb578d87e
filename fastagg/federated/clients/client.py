"""A client: its examples, its adapter's configuration, and what it does with a hand-out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput
from fastagg.federated.clients.fresh_factors import draw_dead_ranks
from fastagg.federated.clients.local_model import LocalModel
from fastagg.federated.clients.token_loss import Encoded
from fastagg.federated.clients.training import (
    LocalTraining,
    Step,
    TrainingDiverged,
    TrainingOutcome,
    fit,
)
from fastagg.federated.messages import ClientFailure, Handout
from fastagg.federated.seeds import seed_of
from fastagg.update import ClientUpdate


class Client:
    """One client; it knows its own data and nothing of the server.

    Clients of one process may share one model: nothing of a client stays in it but the merges that
    all clients make.

    Args:
        name: the client's, unique in the run.
        train: its training examples; their number is its weight.
        held_out: examples for early stopping.
        config: of its adapter, as :meth:`LocalModel.adapter` takes it.
        model: the base model.
        training: how it trains in a round.
        seed: the run's, the same for all clients: they begin with the same rows of A.

    Attributes:
        outcome: of the last training that came to an end.
    """

    def __init__(
        self,
        name: str,
        train: Sequence[Encoded],
        held_out: Sequence[Encoded],
        *,
        config: Any,
        model: LocalModel,
        training: LocalTraining,
        seed: int,
    ) -> None:
        self.name = name
        self.train = train
        self.held_out = held_out
        self.config = config
        self.model = model
        self.training = training
        self.seed = seed
        self.outcome: TrainingOutcome | None = None

    def receive(self, handout: Handout) -> None:
        """What every client does as a round begins, also one that does not take part: where the hand-out
        is to be merged, the base becomes the round's. :meth:`fit` does it by itself.

        Raises:
            InvalidInput: the adapter does not fit the base model, or a round was missed.
        """
        if handout.merge and handout.adapter is not None:
            self.model.merge_for(handout.round, handout.adapter)

    def fit(
        self,
        handout: Handout,
        on_step: Callable[[Step], None] | None = None,
        *,
        folder: Path | None = None,
    ) -> ClientUpdate:
        """Trains for a round and returns the adapter, with the number of examples as its weight.

        The adapter goes on from the hand-out's, or starts afresh where there is none or it is merged;
        so do ranks of the hand-out that are zero in both factors, which could not be trained.

        Args:
            folder: where the adapter is written, over what is there, and then mapped from; None keeps
                it in memory.

        Raises:
            ClientFailure: a loss or a factor is NaN or infinite, the memory does not suffice, or the
                examples cannot be trained on.
            InvalidInput: the hand-out does not fit the base model, or a round was missed.
        """
        self.receive(handout)
        start = self.config if handout.merge or handout.adapter is None else handout.adapter
        factors = seed_of(self.seed, "factors", handout.round)
        with self.model.adapter(start, seed=factors) as network:
            if isinstance(start, Adapter):
                draw_dead_ranks(network, factors)
            with self._failing(handout.round):
                self._train(network, handout.round, on_step)
                adapter = self.model.capture(self.name)
                adapter.check_finite()
                if folder is not None:
                    adapter.save(folder, overwrite=True)
                    adapter = Adapter.load(folder)
                return ClientUpdate(adapter, weight=len(self.train), client_id=self.name)

    def fit_weights(
        self, round: int, on_step: Callable[[Step], None] | None = None
    ) -> dict[str, Tensor]:
        """Trains all weights of the base model for a round, and returns them, by name and on the CPU;
        the model has its own again afterwards.

        Raises:
            ClientFailure: as :meth:`fit`.
        """
        with self.model.all_weights() as network, self._failing(round):
            self._train(network, round, on_step)
            weights = self.model.weights()
            for name, weight in weights.items():
                if not bool(torch.isfinite(weight).all()):
                    raise InvalidInput("the weight is not finite", client=self.name, field=name)
            return weights

    @contextmanager
    def _failing(self, round: int) -> Iterator[None]:
        """Whatever goes wrong inside is this client's, and no reason to end a round."""
        try:
            yield
        # torch says with a RuntimeError that memory is short, or that a step leaves float32.
        except (InvalidInput, TrainingDiverged, MemoryError, RuntimeError) as error:
            raise ClientFailure(self.name, round, str(error) or type(error).__name__) from error

    def _train(
        self, network: nn.Module, round: int, on_step: Callable[[Step], None] | None
    ) -> None:
        self.outcome = fit(
            network,
            self.train,
            self.training,
            seed=seed_of(self.seed, "training", round, self.name),
            held_out=self.held_out,
            on_step=on_step,
        )
