"""Clients that fine-tune real PEFT LoRA adapters of their own ranks on their own text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastagg.demo.settings import Settings
from fastagg.federated.clients.llama import loss_on, train
from fastagg.federated.data.corpus import ClientText

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Client:
    """A client after its local training.

    Losses are in nats per byte: on its own held-out text before and after, and with its own adapter
    on the held-out text of all clients.
    """

    name: str
    rank: int
    weight: int
    folder: str
    own_before: float
    own_after: float
    alone_on_all: float


def train_client(
    base: LlamaForCausalLM,
    texts: list[ClientText],
    index: int,
    settings: Settings,
    *,
    seed: int,
    folder: Path,
    on_step: Callable[[], None] | None = None,
) -> Client:
    """Fine-tunes client ``index`` on its text and saves its adapter as a PEFT folder.

    ``base`` is left as it came: the adapter's layers are taken out again.
    """
    from peft import LoraConfig, get_peft_model

    text, rank = texts[index], settings.ranks[index]
    before = float(loss_on(base, text.held_out).mean())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(base, config)
    try:
        start_from_shared_factors(model, rank=rank, largest=max(settings.ranks), seed=seed)
        train(
            model,
            text.train,
            settings.fine_tuning,
            length=settings.length,
            seed=seed + 1 + index,
            on_step=on_step,
        )
        after = [float(loss_on(model, t.held_out).mean()) for t in texts]
        # "auto" would ask the model hub whether the vocabulary grew.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        model.unload()
    return Client(
        name=text.name,
        rank=rank,
        weight=text.examples(settings.length),
        folder=str(folder),
        own_before=before,
        own_after=after[index],
        alone_on_all=sum(after) / len(after),
    )


def start_from_shared_factors(model: nn.Module, *, rank: int, largest: int, seed: int) -> None:
    """Gives every client the first ``rank`` rows of the same A, as a server that starts them would.

    PEFT's own distribution (Kaiming-uniform: bound 1/sqrt(in)), B = 0. Methods that average A and B
    apart rely on it; to the exact ones it makes no difference.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if ".lora_A." in name:
                width = factor.shape[1]
                rows = (torch.rand(largest, width, generator=draw) * 2 - 1) / math.sqrt(width)
                factor.copy_(rows[:rank])
            elif ".lora_B." in name:
                factor.zero_()


@contextmanager
def loaded(base: LlamaForCausalLM, folder: Path) -> Iterator[PeftModel]:
    """``base`` with the adapter that PEFT loads from ``folder``, for as long as the block lasts."""
    from peft import PeftModel

    with torch.random.fork_rng(devices=[]):
        model = PeftModel.from_pretrained(base, str(folder))
    try:
        yield model
    finally:
        model.unload()


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """What PEFT would add to each weight, scaling B A, in float64: {module: (m, n)}."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            (adapter,) = module.active_adapters
            a = module.lora_A[adapter].get_parameter("weight").detach().double()
            b = module.lora_B[adapter].get_parameter("weight").detach().double()
            found[name.removeprefix("base_model.model.")] = module.scaling[adapter] * (b @ a)
    return found
