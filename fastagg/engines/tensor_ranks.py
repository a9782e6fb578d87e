"""The configuration of an adapter of another rank: the ranks are read from the tensors themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout_reader import ranks_of

__all__ = ["at_ranks_of"]


def at_ranks_of(config: AdapterConfig, state_dict: Mapping[str, torch.Tensor]) -> AdapterConfig:
    """The configuration at the ranks of these tensors, as the client that trained them had it.

    ``lora_alpha`` is taken over: the scaling is lora_alpha / r, or lora_alpha / sqrt(r) under rsLoRA,
    at the tensors' r. A client whose lora_alpha is another has to send a configuration of its own.

    Raises:
        InvalidInput: a configuration whose initialisation ties the base weights to the rank.
    """
    ranks = {module: rank for module, rank in ranks_of(state_dict).items() if rank > 0}
    if all(config.rank_of(module) == rank for module, rank in ranks.items()):
        return config
    scalings = {
        module: config.alpha_of(module) / (math.sqrt(rank) if config.use_rslora else rank)
        for module, rank in ranks.items()
    }
    return config.with_ranks(ranks, scalings, own_modules=ranks)
