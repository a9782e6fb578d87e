"""The base model that all sites have, and its adapter: a Llama of a few thousand weights, drawn from a
seed, so that nothing has to be downloaded."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64
LENGTH = 24


def lora(rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )


def peft_model(rank: int, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The base model with a fresh adapter."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        base = LlamaForCausalLM(config).to(dtype)
        return get_peft_model(base, lora(rank), autocast_adapter_dtype=False)


class GlobalAdapter(torch.nn.Module):
    """The global model of a FedAvg job: its weights are those of the adapter alone."""

    def __init__(self, rank: int = 16) -> None:
        super().__init__()
        self.rank = rank
        self.model = peft_model(rank)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.model, save_embedding_layers=False)
