"""FastAgg in NVFlare: an aggregator for FedAvg recipes and jobs, and a controller that sends each client
an adapter of its own rank.

    recipe = FedAvgRecipe(..., aggregator=FastAggModelAggregator(lora_config))
    recipe = FastAggRecipe(..., ranks={"site-1": 4, "site-2": 16}, initial="first-adapter")

Names are loaded when they are first used. Without NVFlare, or with a version that was never tried, the
import of this package fails with an error that names those that work.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastagg.engines.versions import require

if TYPE_CHECKING:
    from fastagg.engines.nvflare.aggregator import FastAggModelAggregator as FastAggModelAggregator
    from fastagg.engines.nvflare.client import AdapterClient as AdapterClient
    from fastagg.engines.nvflare.controller import FastAggController as FastAggController
    from fastagg.engines.nvflare.recipe import FastAggRecipe as FastAggRecipe

require(
    "nvflare",
    [
        "nvflare.app_common.abstract.fl_model:FLModel",
        "nvflare.app_common.aggregators.model_aggregator:ModelAggregator",
        "nvflare.app_common.workflows.model_controller:ModelController",
        "nvflare.app_common.utils.tensor_disk_offload_context:setup_tensor_disk_offload",
        "nvflare.app_opt.pt.decomposers:TensorDecomposer",
        "nvflare.recipe.spec:Recipe",
    ],
    since="2.9",
    below="2.10",
    extra="nvflare",
)

_HOMES = {
    "AdapterClient": "client",
    "FastAggController": "controller",
    "FastAggModelAggregator": "aggregator",
    "FastAggRecipe": "recipe",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastagg.engines.nvflare' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastagg.engines.nvflare.{_HOMES[name]}"), name)
