"""The side of a NumPyClient: what ``fit`` and ``evaluate`` are given, and what they return.

    def fit(self, parameters, config):
        received = receive_arrays(parameters, config)
        ...
        return fit_result(get_peft_model_state_dict(model), model.peft_config["default"], examples)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastagg.engines.flower.client import Received
from fastagg.engines.flower.codec import unwarned
from fastagg.engines.flower.fields import config_text, introduce
from fastagg.engines.flower.legacy_fields import Arrays, as_text, named_arrays, read_received

__all__ = ["fit_result", "properties", "receive_arrays"]


def receive_arrays(parameters: Sequence[Any], config: Mapping[str, Any]) -> Received:
    """Reads what :class:`FastAggFedAvg` sent; ``merges`` may hold rounds that were merged before.

    Raises:
        InvalidInput: not sent by FastAgg's strategy, or damaged.
    """
    with unwarned():
        return read_received(parameters, config)


def fit_result(
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    examples: int,
    metrics: Mapping[str, Any] | None = None,
) -> tuple[Arrays, int, dict[str, Any]]:
    """What ``fit`` returns; arguments as of :func:`fastagg.engines.flower.train_reply`."""
    arrays, names = named_arrays(tensors)
    fields: dict[str, Any] = {"tensors": names}
    if config is not None:
        fields["adapter-config"] = config_text(config)
    return arrays, examples, {**(metrics or {}), **as_text(fields)}


def properties(
    *,
    client: str | None = None,
    rank: int | None = None,
    config: Any = None,
    merged_through: int = 0,
) -> dict[str, Any]:
    """What ``get_properties`` returns; arguments as of :func:`fastagg.engines.flower.query_reply`."""
    return as_text(introduce(client, rank, config, merged_through))
