"""Models of a few thousand weights and examples for them, drawn from seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LENGTH = 32
PROJECTIONS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, eq=False)
class Tokens:
    input_ids: torch.Tensor
    labels: torch.Tensor


def llama(*, tied: bool = True, layers: int = 2) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    """Conv1D modules, tied embeddings, and dropout of its own."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=LENGTH, initializer_range=0.2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return transformers.GPT2LMHeadModel(config)


def lora(rank: int, **options: Any) -> Any:
    options = {
        "lora_alpha": 2 * rank,
        "target_modules": PROJECTIONS,
        "task_type": "CAUSAL_LM",
    } | options
    return peft.LoraConfig(r=rank, **options)


def gpt2_lora(rank: int, **options: Any) -> Any:
    return lora(rank, target_modules=["c_attn", "c_proj", "c_fc"], **options)


def examples(count: int, seed: int = 0) -> list[Tokens]:
    """Of 6 to LENGTH - 1 tokens of which the first 2 are prompt: each follows from the one before it,
    so that there is something to learn."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        tokens = int(torch.randint(6, LENGTH, (1,), generator=draw))
        start = torch.randint(1, 64, (1,), generator=draw)
        ids = (start + 7 * torch.arange(tokens)) % 64
        labels = ids.clone()
        labels[:2] = -100
        made.append(Tokens(ids, labels))
    return made


@torch.no_grad()
def logits(network: torch.nn.Module, seed: int = 3) -> torch.Tensor:
    ids = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(seed))
    device = next(network.parameters()).device
    return network(input_ids=ids.to(device), use_cache=False).logits.cpu()  # type: ignore[no-any-return]


def disturb(network: torch.nn.Module, seed: int = 1) -> None:
    """Gives what asks for gradients values that a training could have given it."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=draw).to(weight) * 0.1)
