"""The dtypes that factors may have: their codes in the int64 tables, and their names.

Apart from the ops, so that reading files needs no compiled library.
"""

from __future__ import annotations

import torch

__all__ = ["DTYPE_CODES", "dtype_name"]

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The codes that stand for a dtype in the int64 tables."""


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as users write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
