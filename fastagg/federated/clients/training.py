"""A client's local training: AdamW on batches of its examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastagg.errors import InvalidInput
from fastagg.federated.clients.early_stopping import EarlyStopping, HeldOutLoss, TrainingDiverged
from fastagg.federated.clients.token_loss import Batch, Encoded, require_labels, summed_loss
from fastagg.federated.seeds import seed_of, seeded

__all__ = ["LocalTraining", "Schedule", "Step", "TrainingDiverged", "TrainingOutcome", "fit"]

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in a round.

    Attributes:
        epochs, steps: one of them: passes over the client's examples, or batches.
        batch: examples in a batch; the last one of an epoch may be smaller.
        learning_rate: the largest, after the warm-up.
        schedule: what follows the warm-up: constant, or falling to zero as a line or a half cosine.
        warm_up: share of the steps in which the rate rises to its largest, as a line.
        weight_decay: AdamW's.
        clip: the largest norm of the gradient, all tensors together; None clips nothing.
        patience: stop after so many evaluations on held-out examples in a row without a lower loss, and
            go back to the weights of the lowest (those before training among them); None never stops.
        evaluate_every: steps between these evaluations; None: as many as an epoch has.

    Raises:
        InvalidInput: a value that nothing can be trained with.
    """

    epochs: int | None = 1
    steps: int | None = None
    batch: int = 8
    learning_rate: float = 3e-4
    schedule: Schedule = "cosine"
    warm_up: float = 0.1
    weight_decay: float = 0.0
    clip: float | None = 1.0
    patience: int | None = None
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise InvalidInput(
                "how long to train?",
                field="epochs, steps",
                expected="one of them",
                got="neither" if self.epochs is None else "both",
            )
        for field in ("epochs", "steps", "batch", "patience", "evaluate_every"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise _unusable(field, "an integer >= 1", value)
        if self.schedule not in ("constant", "linear", "cosine"):
            raise _unusable("schedule", "constant, linear or cosine", self.schedule)
        if not 0 < self.learning_rate < math.inf:
            raise _unusable("learning_rate", "a finite number > 0", self.learning_rate)
        if not 0 <= self.warm_up <= 1:
            raise _unusable("warm_up", "a share from 0 to 1", self.warm_up)
        if not 0 <= self.weight_decay < math.inf:
            raise _unusable("weight_decay", "a finite number >= 0", self.weight_decay)
        if self.clip is not None and not self.clip > 0:
            raise _unusable("clip", "a number > 0", self.clip)

    def steps_in_epoch(self, examples: int) -> int:
        """Batches that one pass over so many examples takes."""
        return math.ceil(examples / self.batch)

    def total_steps(self, examples: int) -> int:
        """Batches that the whole training takes, unless it stops early."""
        return self.steps or (self.epochs or 0) * self.steps_in_epoch(examples)

    def early_stopping(
        self, network: nn.Module, held_out: Sequence[Encoded], examples: int
    ) -> EarlyStopping | None:
        """What watches a training on so many examples; None where nothing is to."""
        if self.patience is None:
            return None
        every = self.evaluate_every or self.steps_in_epoch(examples)
        return EarlyStopping(network, held_out, patience=self.patience, every=every, batch=self.batch)

    def rate(self, step: int, total: int) -> float:
        """The share of the learning rate at a step, the first being 0: in (0, 1] at all of ``total``."""
        rising = math.ceil(self.warm_up * total)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, total - rising)
        match self.schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1 - done
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Step:
    """What is told after each step: the first of ``steps`` is 1; loss: nats per token, of its batch."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training did.

    Attributes:
        losses: of each step's batch, before that step, in nats per token.
        tokens: labelled tokens of each batch.
        examples: examples seen, repetitions counted.
        seconds: wall-clock time.
        held_out: where early stopping is on: the losses it went by, that before training first.
        kept_step: the step whose weights were kept.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    examples: int
    seconds: float
    held_out: tuple[HeldOutLoss, ...]
    kept_step: int

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """The mean over all labelled tokens that were trained on."""
        pairs = zip(self.losses, self.tokens, strict=True)
        return sum(loss * tokens for loss, tokens in pairs) / sum(self.tokens)


def fit(
    network: nn.Module,
    examples: Sequence[Encoded],
    training: LocalTraining,
    *,
    seed: int,
    held_out: Sequence[Encoded] = (),
    on_step: Callable[[Step], None] | None = None,
) -> TrainingOutcome:
    """Trains the parameters of ``network`` that ask for gradients, in place.

    The same seed gives the same bits on the same machine, whatever was drawn before: the order of the
    examples has a generator of its own, and dropout draws inside a fork of torch's. The network is left
    in evaluation mode.

    Args:
        held_out: the examples that early stopping goes by; not read without.
        on_step: called after each step; what it raises (KeyboardInterrupt) ends the training.

    Raises:
        InvalidInput: no examples, one without a labelled token, or early stopping without ``held_out``.
        TrainingDiverged: a loss is NaN or infinite.
    """
    require_labels(examples, "examples")
    stopping = training.early_stopping(network, held_out, len(examples))
    started = time.perf_counter()
    steps = training.total_steps(len(examples))
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: training.rate(step, steps))
    order = _order(len(examples), training.batch, seed_of(seed, "batches"))
    losses: list[float] = []
    tokens: list[int] = []
    seen = 0
    try:
        with seeded(seed_of(seed, "dropout"), trained[0].device):
            if stopping is not None:
                stopping.look(0, steps)
            for step in range(1, steps + 1):
                batch = Batch.of([examples[i] for i in next(order)])
                network.train()
                loss = summed_loss(network, batch) / batch.tokens
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TrainingDiverged(step, value)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if training.clip is not None:
                    nn.utils.clip_grad_norm_(trained, training.clip)
                optimiser.step()
                schedule.step()
                losses.append(value)
                tokens.append(batch.tokens)
                seen += len(batch.labels)
                if on_step is not None:
                    on_step(Step(step, steps, value))
                if stopping is not None and stopping.look(step, steps):
                    break
    finally:
        optimiser.zero_grad(set_to_none=True)
        network.eval()
    return TrainingOutcome(
        losses=tuple(losses),
        tokens=tuple(tokens),
        examples=seen,
        seconds=time.perf_counter() - started,
        held_out=tuple(stopping.history) if stopping else (),
        kept_step=stopping.restore() if stopping else len(losses),
    )


def _order(examples: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices, each example once in an epoch, epoch after epoch."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        shuffled: list[int] = torch.randperm(examples, generator=draw).tolist()
        for begin in range(0, examples, batch):
            yield shuffled[begin : begin + batch]


def _unusable(field: str, expected: str, got: object) -> InvalidInput:
    return InvalidInput("nothing can be trained so", field=field, expected=expected, got=repr(got))
