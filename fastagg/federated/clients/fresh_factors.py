"""The factors that an adapter begins with: A drawn from a seed, B zero, so that scaling B A is zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastagg.federated.seeds import seed_of

if TYPE_CHECKING:
    from peft import PeftModel

_PREFIX = "base_model.model."

Draw = Callable[[int, torch.Generator], Tensor]


def draw_factors(model: PeftModel, seed: int) -> None:
    """Draws the factors of every LoRA module of a model anew, in PEFT's own distributions.

    A is uniform in +-1/sqrt(fan in); of an embedding it is B that is drawn, normal, and A is zero.
    Each module has a generator of its own and its ranks are drawn one by one: adapters of different
    ranks, or of different modules, share all that they have in common. Methods that average A and B
    apart rely on that; to the exact ones it makes no difference.
    """
    with torch.no_grad():
        for drawn, zero, fresh in _first_factors(model, seed):
            drawn.copy_(fresh)
            zero.zero_()


def draw_dead_ranks(model: PeftModel, seed: int) -> None:
    """Draws, as :func:`draw_factors` would, the ranks of which both factors are zero.

    A client whose rank is above dW's gets such ranks, and neither factor would ever have a gradient
    again, for each is the other's times something. With one of them drawn B A is what it was.
    """
    with torch.no_grad():
        for drawn, zero, fresh in _first_factors(model, seed):
            dead = (drawn.flatten(1) == 0).all(1) & (zero.flatten(1) == 0).all(1)
            drawn[dead] = fresh[dead].to(drawn)


def _first_factors(model: PeftModel, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For every LoRA module: the factor that is drawn and the one that begins at zero, as they are, and
    the first one's fresh numbers; views of which the first dimension is the rank."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        generator = torch.Generator().manual_seed(seed_of(seed, name.removeprefix(_PREFIX)))
        for adapter, factor in layer.lora_A.items():
            a = factor.get_parameter("weight")
            b = layer.lora_B[adapter].get_parameter("weight").transpose(0, 1)
            yield a, b, ranks_of(len(a), a[0].numel(), uniform, generator).view(a.shape)
        for adapter, b in layer.lora_embedding_B.items():
            fresh = ranks_of(b.shape[1], b.shape[0], normal, generator)
            yield b.t(), layer.lora_embedding_A[adapter], fresh


def ranks_of(rank: int, width: int, draw: Draw, generator: torch.Generator) -> Tensor:
    """(rank, width) float32, row by row: the first rows do not depend on how many there are."""
    return torch.stack([draw(width, generator) for _ in range(rank)])


def uniform(width: int, generator: torch.Generator) -> Tensor:
    """A row of A: +-1/sqrt(width)."""
    return (torch.rand(width, generator=generator) * 2 - 1) / math.sqrt(width)


def normal(width: int, generator: torch.Generator) -> Tensor:
    """A column of an embedding's B."""
    return torch.randn(width, generator=generator)
