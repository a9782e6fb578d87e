"""Encoded examples, batches of them, and a loss that is a mean over labelled tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastagg.errors import InvalidInput
from fastagg.federated.data.prompt import IGNORED


class Encoded(Protocol):
    """An example as the model takes it: two (tokens,) int64 tensors; ``IGNORED`` labels the prompt."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to the longest: three (examples, tokens) int64 tensors.

    Padding has attention 0 and label ``IGNORED``; its token is 0, which nothing reads.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Encoded]) -> Batch:
        """One batch of all examples."""
        ids = [example.input_ids for example in examples]
        return cls(
            pad_sequence(ids, batch_first=True),
            pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
            pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORED),
        )

    @property
    def tokens(self) -> int:
        """Labelled tokens that are predicted: the first of a sequence never is."""
        return int((self.labels[:, 1:] != IGNORED).sum())


@dataclass(frozen=True)
class TokenLoss:
    """A sum of cross entropies in nats, and how many labelled tokens it is over."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token; NaN where there is none."""
        return self.total / self.tokens if self.tokens else math.nan


def summed_loss(network: nn.Module, batch: Batch) -> Tensor:
    """The sum of the cross entropies of a batch's ``tokens``: a float32 scalar on the model's device.

    A sum, not transformers' own mean, so that means over several batches weigh each token alike.
    """
    device = next(network.parameters()).device
    logits = network(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
    ).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch.labels[:, 1:].flatten().to(device),
        ignore_index=IGNORED,
        reduction="sum",
    )


@torch.no_grad()
def loss_on(network: nn.Module, examples: Sequence[Encoded], *, batch: int = 16) -> TokenLoss:
    """The loss of a model on examples, ``batch`` at a time; the model is left in evaluation mode."""
    network.eval()
    total, tokens = 0.0, 0
    for begin in range(0, len(examples), batch):
        part = Batch.of([examples[i] for i in range(begin, min(begin + batch, len(examples)))])
        total += float(summed_loss(network, part))
        tokens += part.tokens
    return TokenLoss(total, tokens)


def require_labels(examples: Sequence[Encoded], field: str) -> None:
    """Raises InvalidInput where there is no example, or one that has no token to learn."""
    if not len(examples):
        raise InvalidInput("there is nothing to train on or to go by", field=field, got="no examples")
    for index, example in enumerate(examples):
        if example.input_ids.shape != example.labels.shape or example.labels.ndim != 1:
            raise InvalidInput(
                "not an encoded example",
                field=f"{field}[{index}]",
                expected="input_ids and labels of one shape (tokens,)",
                got=f"{tuple(example.input_ids.shape)} and {tuple(example.labels.shape)}",
            )
        if not bool((example.labels[1:] != IGNORED).any()):
            raise InvalidInput(
                "an example without a token to learn",
                field=f"{field}[{index}]",
                expected=f"a label other than {IGNORED} after the first token",
                cure="Drop it, or truncate the prompt rather than the answer",
            )
