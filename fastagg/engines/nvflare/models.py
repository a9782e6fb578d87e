"""Adapters as FLModels: what stands in ``params`` and in ``meta``, both ways."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from fastagg.adapter import Adapter
from fastagg.engines.tensor_ranks import at_ranks_of
from fastagg.errors import InvalidInput, short
from fastagg.peft_format.adapter_folder import named_path, read_config
from fastagg.peft_format.config import AdapterConfig

__all__ = [
    "ASK",
    "CONFIG",
    "MERGES",
    "adapter_in",
    "config_in",
    "config_of",
    "merges_in",
    "model_of",
    "tensors_in",
    "weight_in",
]

# Keys of FLModel.meta.
CONFIG = "adapter_config"
"""The fields of the adapter_config.json that the tensors in ``params`` belong to."""
MERGES = "fastagg.merges"
"""Round -> configuration of the stack that is to be merged; its tensors are in ``params``."""
ASK = "fastagg.ask"
"""The server asks for the client's configuration: no training, no tensors."""

# Without it, a job that sends a tensor waits for ever. Whoever imports this file can send and receive.
fobs.register(TensorDecomposer)


def config_of(config: Any) -> dict[str, Any]:
    """The fields of an ``adapter_config.json``, as JSON and so a job's configuration can hold them.

    Args:
        config: a ``peft.LoraConfig``, a mapping, or the folder of an adapter.

    Raises:
        InvalidInput: not the configuration of an adapter that can be aggregated.
    """
    if isinstance(config, (str, os.PathLike)):
        config = read_config(Path(config), named_path(config).name)
    elif not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        config = config.to_dict()
    return dict(AdapterConfig.from_dict(config).raw)


def model_of(
    adapter: Adapter | None, merges: tuple[tuple[int, Adapter], ...] = (), **meta: Any
) -> FLModel:
    """An adapter, and stacks to be merged before, as one FLModel of flat ``params``.

    Each stack's keys begin with its round; views of the adapters, not copies.
    """
    params = dict(adapter.state_dict()) if adapter is not None else {}
    if adapter is not None:
        meta[CONFIG] = dict(adapter.config.raw)
    if merges:
        meta[MERGES] = {str(number): dict(stack.config.raw) for number, stack in merges}
    for number, stack in merges:
        params |= {_merge_prefix(number) + key: value for key, value in stack.state_dict().items()}
    return FLModel(params_type=ParamsType.FULL, params=params, meta=meta)


def adapter_in(model: FLModel, config: AdapterConfig) -> Adapter | None:
    """The adapter of a model, without the stacks; None where there is none.

    Args:
        config: of a model that brings none along, but for the ranks.
    """
    params = {key: value for key, value in tensors_in(model).items() if not key.startswith(MERGES)}
    if not params:
        return None
    return Adapter(params, config_in(model) or at_ranks_of(config, params), name="what the server sent")


def merges_in(model: FLModel) -> list[tuple[int, Adapter]]:
    """The stacks of a model that :func:`model_of` made, with their rounds, the oldest first."""
    tensors, found = tensors_in(model), []
    configs = {int(number): config for number, config in (model.meta or {}).get(MERGES, {}).items()}
    for number, config in sorted(configs.items()):
        prefix = _merge_prefix(number)
        own = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        found.append((number, Adapter(own, config, name=f"round {number}")))
    return found


def tensors_in(model: FLModel, client: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a model: numpy arrays are wrapped, references to files on the disk are read.

    Raises:
        InvalidInput: no tensors, differences instead of values, or something that is neither.
    """
    if model.params_type == ParamsType.DIFF:
        raise InvalidInput(
            "differences of A and of B do not make a difference of B A",
            client=client,
            field="params_type",
            expected="FULL",
            got="DIFF",
            cure="Set params_transfer_type=TransferType.FULL in the recipe, or send "
            "FLModel(params_type=ParamsType.FULL, params=...) from the client",
        )
    if not isinstance(model.params, Mapping):
        raise InvalidInput(
            "not the tensors of an adapter",
            client=client,
            field="params",
            expected="a mapping from keys to tensors",
            got=type(model.params).__name__,
        )
    return {key: _tensor(value) for key, value in model.params.items()}


def config_in(model: FLModel) -> dict[str, Any] | None:
    """The configuration that a model brings along, None where it has none."""
    found = (model.meta or {}).get(CONFIG)
    return dict(found) if found is not None else None


def weight_in(model: FLModel, key: str, client: str) -> float | None:
    """What the client counts for, under this key of the model's meta; None where it does not say.

    Raises:
        InvalidInput: it says something that is no number.
    """
    weight = (model.meta or {}).get(key)
    if isinstance(weight, (np.generic, torch.Tensor)):
        weight = weight.item()
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float))):
        raise InvalidInput(
            "not a weight", client=client, field=key, expected="a number", got=short(weight)
        )
    return weight


def _tensor(value: Any) -> Any:
    # NVFlare's tensor disk offload hands over references to files.
    if hasattr(value, "materialize"):
        value = value.materialize()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return value


def _merge_prefix(number: int) -> str:
    return f"{MERGES}.{number}/"
