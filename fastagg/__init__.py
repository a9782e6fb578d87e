"""Exact, fast aggregation of many clients' LoRA adapters of different ranks.

    dW_j = sum_k p_kj s_kj B_kj A_kj

Names are loaded when they are first used, so that ``import fastagg`` costs little more than torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastagg.adapter import Adapter as Adapter
    from fastagg.aggregation import Aggregate as Aggregate
    from fastagg.aggregator import Aggregator as Aggregator
    from fastagg.errors import FastAggError as FastAggError
    from fastagg.errors import InvalidInput as InvalidInput
    from fastagg.errors import MemoryBudgetExceeded as MemoryBudgetExceeded
    from fastagg.factors import reconstruct as reconstruct
    from fastagg.factors import stack as stack
    from fastagg.linalg import truncated_svd as truncated_svd
    from fastagg.update import ClientUpdate as ClientUpdate
    from fastagg.whole_round import aggregate as aggregate

try:
    __version__ = version("fastagg")
except PackageNotFoundError:  # run from a source folder that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "Adapter": "adapter",
    "Aggregate": "aggregation",
    "Aggregator": "aggregator",
    "ClientUpdate": "update",
    "FastAggError": "errors",
    "InvalidInput": "errors",
    "MemoryBudgetExceeded": "errors",
    "aggregate": "whole_round",
    "reconstruct": "factors",
    "stack": "factors",
    "truncated_svd": "linalg",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fastagg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastagg.{home}"), name)
    # Kept, so that the next use does not come here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
