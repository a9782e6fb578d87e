"""Early stopping by the loss on held-out examples, and the weights that had the lowest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastagg.errors import FastAggError
from fastagg.federated.clients.token_loss import Encoded, loss_on, require_labels


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on held-out examples after so many steps, in nats per token."""

    step: int
    loss: float


class TrainingDiverged(FastAggError):
    """A loss that is NaN or infinite, in training or on held-out examples."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(
            f"the training diverged: the loss is {loss} at step {step}; "
            "a lower learning rate or a smaller clip may help"
        )
        self.step = step
        self.loss = loss

    def __reduce__(self) -> tuple[object, ...]:
        return TrainingDiverged, (self.step, self.loss)


class EarlyStopping:
    """Looks at a training from time to time.

    Args:
        network: what is trained: its parameters that ask for gradients.
        held_out: examples that the training does not see; at least one.
        patience: how many looks in a row may find no lower loss.
        every: steps between looks.
        batch: examples in a batch of held-out ones.

    Attributes:
        history: the losses that were found.
    """

    def __init__(
        self,
        network: nn.Module,
        held_out: Sequence[Encoded],
        *,
        patience: int,
        every: int,
        batch: int,
    ) -> None:
        require_labels(held_out, "held_out")
        self.history: list[HeldOutLoss] = []
        self._network = network
        self._trained = [weight for weight in network.parameters() if weight.requires_grad]
        self._held_out = held_out
        self._patience = patience
        self._every = every
        self._batch = batch
        self._best = HeldOutLoss(0, math.inf)
        self._weights: list[Tensor] = []

    def look(self, step: int, steps: int) -> bool:
        """Evaluates after a step (0: before the first) where it is time, and after the last.

        Returns:
            Whether to stop here.

        Raises:
            TrainingDiverged: the loss is NaN or infinite.
        """
        if step % self._every and step != steps:
            return False
        found = HeldOutLoss(step, loss_on(self._network, self._held_out, batch=self._batch).mean)
        if not math.isfinite(found.loss):
            raise TrainingDiverged(step, found.loss)
        self.history.append(found)
        if found.loss < self._best.loss:
            self._best = found
            self._weights = [weight.detach().clone() for weight in self._trained]
        return len(self.history) - 1 - self.history.index(self._best) >= self._patience

    def restore(self) -> int:
        """Goes back to the weights of the lowest loss; returns the step that they are of."""
        with torch.no_grad():
            for weight, best in zip(self._trained, self._weights, strict=True):
                weight.copy_(best)
        return self._best.step
