"""Small tables on their way to a device, without a wait.

To copy from pageable memory CUDA may synchronise with the stream first. A copy from pinned memory
takes its turn in the stream, and torch keeps the pinned block until it is done.
"""

from __future__ import annotations

import torch

__all__ = ["pinned", "uploaded"]


def pinned(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host table as an op on the device takes it best: checked here, uploaded without a wait."""
    return table.pin_memory() if device.type == "cuda" and table.is_cpu else table


def uploaded(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The table on the device, for work of the current stream."""
    return pinned(table, device).to(device, non_blocking=True)
