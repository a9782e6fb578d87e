"""A byte-level Llama and its training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastagg.federated.data.corpus import SEPARATOR

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """Widths of the model; its vocabulary is the 256 bytes."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Training:
    """A run of AdamW: ``steps`` batches of ``batch`` windows, warm-up and cosine decay."""

    steps: int
    batch: int
    learning_rate: float


def new_llama(shape: Shape, *, length: int, seed: int) -> LlamaForCausalLM:
    """An untrained Llama for windows of ``length`` bytes; float32, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(length, 128),
        tie_word_embeddings=True,
        bos_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
        pad_token_id=SEPARATOR,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(
    model: nn.Module,
    text: Tensor,
    training: Training,
    *,
    length: int,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> None:
    """Trains the parameters that ask for gradients on windows drawn from ``text`` ((bytes,) uint8)."""
    draw = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_up_and_cosine(training.steps))
    windows = text.unfold(0, length, 1)
    model.train()
    for _ in range(training.steps):
        starts = torch.randint(len(windows), (training.batch,), generator=draw)
        batch = windows[starts].long()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step()
    model.eval()


def _warm_up_and_cosine(steps: int) -> Callable[[int], float]:
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, steps - warm_up)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return factor
