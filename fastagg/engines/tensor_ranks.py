"""The configuration of an adapter of another rank: the ranks are read from the tensors themselves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout_reader import read_ranks

__all__ = ["at_ranks_of"]


def at_ranks_of(config: AdapterConfig, state_dict: Mapping[Any, Any]) -> AdapterConfig:
    """The configuration at the ranks of these tensors, as the client that trained them had it.

    ``lora_alpha`` is taken over: the scaling is lora_alpha / r, or lora_alpha / sqrt(r) under rsLoRA,
    at the tensors' r. A client whose lora_alpha is another has to send a configuration of its own.
    What is no named tensor is passed over.

    Raises:
        InvalidInput: a configuration whose initialisation ties the base weights to the rank.
    """
    shapes = (
        (key, tensor.shape)
        for key, tensor in state_dict.items()
        if isinstance(key, str) and isinstance(tensor, torch.Tensor)
    )
    ranks = {module: rank for module, rank in read_ranks(shapes).items() if rank > 0}
    return _at_ranks(config, tuple(sorted(ranks.items())))


@lru_cache(maxsize=256)
def _at_ranks(config: AdapterConfig, ranks: tuple[tuple[str, int], ...]) -> AdapterConfig:
    """Cached, so that clients of the same ranks share a layout too."""
    return config.at_ranks(dict(ranks))
