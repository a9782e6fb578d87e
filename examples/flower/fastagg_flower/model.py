"""A tiny Llama, its adapters, and what a client trains it on: made from seeds, nothing is downloaded."""

from __future__ import annotations

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import LlamaConfig, LlamaForCausalLM

import fastagg

LENGTH = 32
TOKENS = 64


def base_model() -> LlamaForCausalLM:
    """The model that all clients have, with random weights."""
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def fresh_config(rank: int = 8) -> LoraConfig:
    """What the server begins with; a client's differs from it in the rank."""
    return LoraConfig(
        r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )


def with_adapter(base: LlamaForCausalLM, adapter: fastagg.Adapter | None, rank: int) -> PeftModel:
    """The base model with the adapter that was received, or with a fresh one, ready to be trained."""
    if adapter is None:
        return get_peft_model(base, fresh_config(rank))
    config = PeftConfig.from_peft_type(**adapter.config.raw)
    config.inference_mode = False
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, adapter.state_dict())
    return model


def trained(model: PeftModel, dtype: str) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """The adapter's tensors in a dtype, and its configuration."""
    # "auto" would ask the model hub whether the vocabulary grew.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in state.items()}
    return tensors, model.peft_config["default"]


def fresh_adapter(dtype: str) -> fastagg.Adapter:
    """The modules and the configuration of all adapters, which the server cuts to ranks."""
    return fastagg.Adapter(*trained(get_peft_model(base_model(), fresh_config()), dtype))


def examples(client: int, count: int) -> torch.Tensor:
    """Sequences that count up, in steps that are the client's own: (count, LENGTH) tokens."""
    generator = torch.Generator().manual_seed(client)
    first = torch.randint(TOKENS, (count, 1), generator=generator)
    return (first + torch.arange(LENGTH) * (2 * client + 1)) % TOKENS


def train(model: PeftModel, tokens: torch.Tensor, steps: int, learning_rate: float) -> float:
    """Steps of AdamW over all tokens; returns the loss before the last."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
    return loss.item()


@torch.no_grad()
def loss_of(model: PeftModel, tokens: torch.Tensor) -> float:
    """The mean loss per token, in nats."""
    model.eval()
    return model(input_ids=tokens, labels=tokens).loss.item()
