"""Options as users give them."""

from __future__ import annotations

import numbers
import re
from collections.abc import Sequence

import torch

from fastagg import _library
from fastagg.errors import InvalidInput, short

__all__ = ["check_choice", "parse_device", "parse_dtype", "parse_seed"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def check_choice(field: str, value: str, choices: Sequence[str]) -> str:
    """One of a few words.

    Raises:
        InvalidInput: another.
    """
    if value not in choices:
        raise InvalidInput(
            "no such option", field=field, expected=" or ".join(map(repr, choices)), got=repr(value)
        )
    return value


def parse_seed(value: int) -> int:
    """A seed, which the generator takes as 63 bits.

    Raises:
        InvalidInput: no such integer.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not 0 <= value < 2**63:
        raise InvalidInput(
            "not a seed", field="seed", expected="an integer from 0 to 2^63 - 1", got=short(value)
        )
    return int(value)


def parse_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that factors may have, or None.

    Raises:
        InvalidInput: another.
    """
    found = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if value is not None and found not in _DTYPES.values():
        raise InvalidInput(
            "not a dtype that adapters may have",
            field="dtype",
            expected=", ".join(_DTYPES),
            got=str(value),
        )
    return found


def parse_device(value: str) -> torch.device:
    """Where the work is done: "cpu", "cuda" (the current GPU) or "cuda:1"; "auto" is the current GPU
    where the CUDA kernels can run on it.

    Raises:
        InvalidInput: no such device, or it cannot be used here.
    """
    named = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", value)
    if named is None:
        raise InvalidInput(
            "no such option",
            field="device",
            expected="'auto', 'cpu', 'cuda' or 'cuda:' and the number of a GPU",
            got=short(value),
        )
    if value == "cpu":
        return torch.device("cpu")
    index = None if named[1] is None else int(named[1])
    obstacle = _library.cuda_obstacle(index)
    if obstacle is None:
        # With its number: the current GPU may be another one when the next update comes.
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)
    if value == "auto":
        return torch.device("cpu")
    raise InvalidInput(
        "the GPU cannot be used",
        field="device",
        expected="a GPU of torch's, and FastAgg's CUDA kernels for it",
        got=obstacle,
        cure="Use device='cpu'; `fastagg info` tells more",
    )
