"""A server's state as tensors and text, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch

from fastagg.errors import InvalidInput, short
from fastagg.federated.server.registry import Registry, check_alike
from fastagg.federated.server.server_model import Rules, ServerModel
from fastagg.federated.server.server_optimisers import ServerOptimiser

__all__ = ["State", "dump", "identity", "load"]

# The one text of a state: everything that is no tensor, as JSON.
HEADER = "fastagg"
VERSION = 1

State = dict[str, "torch.Tensor | str"]


def identity(method: str, optimiser: ServerOptimiser, clients: Registry) -> dict[str, Any]:
    """What a state and the server that continues from it must agree on, as JSON holds it."""
    settings: dict[str, Any] = {}
    if dataclasses.is_dataclass(optimiser) and not isinstance(optimiser, type):
        settings = dataclasses.asdict(optimiser)
    return {
        "version": VERSION,
        "method": method,
        "optimiser": {"name": type(optimiser).__name__, **settings},
        "clients": clients.kind_of,
    }


def dump(model: ServerModel, round: int, own: Mapping[str, Any]) -> State:
    """The state of a server: tensors on the host, and one text.

    Args:
        round: the one that comes next.
        own: its :func:`identity`.
    """
    tensors = model.tensors()
    header = {
        **own,
        "round": round,
        "configs": [dict(adapter.config.raw) for adapter in model.adapters],
        "tensors": sorted(tensors),
    }
    return {HEADER: json.dumps(header), **tensors}


def load(
    state: Mapping[str, Any], own: Mapping[str, Any], clients: Registry, rules: Rules
) -> tuple[ServerModel, int]:
    """The model of a state, and the number of the round that comes next.

    Raises:
        InvalidInput: not a state, a damaged one, or one of another server.
    """
    try:
        header = json.loads(state[HEADER])
        for name, expected in own.items():
            if header[name] != expected:
                raise _unusable(f"it is of another {name}", short(expected), short(header[name]))
        tensors = {name: value for name, value in state.items() if name != HEADER}
        if header["tensors"] != sorted(tensors):
            raise _unusable("tensors are missing, or too many", len(header["tensors"]), len(tensors))
        model = ServerModel.with_tensors(tensors, header["configs"], rules)
        number = int(header["round"])
        expected_adapters = model.adapters[: int(number > 1)] if rules.merging else clients.kinds
        if number < 1 or len(model.adapters) != len(expected_adapters):
            raise _unusable("it has not the adapters of its round")
        for adapter, like in zip(model.adapters, expected_adapters, strict=True):
            check_alike(adapter, like, None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InvalidInput) and error.field == "state":
            raise
        raise _unusable(f"{type(error).__name__}: {error}") from error
    return model, number


def _unusable(problem: str, expected: object = None, got: object = None) -> InvalidInput:
    return InvalidInput(
        f"this state cannot be continued: {problem}",
        field="state",
        expected=expected,
        got=got,
        cure="Load what the same server saved: its method, optimiser, clients and their configurations",
    )
