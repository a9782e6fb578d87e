"""Messages of Flower's older API, which has lists of arrays without names, and scalars.

FastAgg's fields are one JSON text there, ``fastagg``, in the config that a client gets and in the
metrics and properties that it answers: those of :mod:`fastagg.engines.flower.fields`, and in ``tensors``
the key and the dtype of each array. Stacks that a client merges follow its own adapter's arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from fastagg.adapter import Adapter
from fastagg.engines.exchange import Outgoing
from fastagg.engines.flower.client import Received
from fastagg.engines.flower.codec import from_array, to_array
from fastagg.engines.flower.fields import FASTAGG, outgoing_fields, read_config
from fastagg.errors import InvalidInput, short

__all__ = ["as_text", "for_client", "named", "named_arrays", "read_fields", "read_received"]

Arrays = list["np.ndarray[Any, Any]"]
Names = Sequence[tuple[str, str]]


def as_text(fields: Mapping[str, Any]) -> dict[str, str]:
    """Fields as a config, metrics or properties hold them."""
    return {FASTAGG: json.dumps(dict(fields))}


def read_fields(scalars: Mapping[str, Any], client: str | None = None) -> dict[str, Any]:
    """FastAgg's fields; none where there are none.

    Raises:
        InvalidInput: not a JSON object.
    """
    text = scalars.get(FASTAGG, "{}")
    try:
        fields = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InvalidInput(
            "what the client says cannot be read",
            client=client,
            field=FASTAGG,
            expected="a JSON object",
            got=short(text),
        )
    return fields


def named_arrays(tensors: Mapping[str, torch.Tensor]) -> tuple[Arrays, list[tuple[str, str]]]:
    """Tensors as arrays, and the key and the dtype of each."""
    made = {key: to_array(tensor, key) for key, tensor in tensors.items()}
    return [array for array, _ in made.values()], [(key, name) for key, (_, name) in made.items()]


def named(
    arrays: Sequence[Any], names: object, read: Callable[..., torch.Tensor], client: str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of which these are the arrays, by their names; views.

    Args:
        read: ``from_array``, or ``from_npy`` where the arrays are bytes.

    Raises:
        InvalidInput: names that are none, or another number of arrays.
    """
    try:
        pairs = [(str(key), str(dtype)) for key, dtype in names]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        pairs = []
    if len(pairs) != len(arrays) or len({key for key, _ in pairs}) != len(pairs):
        raise InvalidInput(
            "the arrays are not those of an adapter",
            client=client,
            field="tensors",
            expected=f"the key and the dtype of each of {len(arrays)} arrays",
            got=short(names),
            cure="Answer with fit_result(), or with as many arrays as came, in their order",
        )
    return {
        key: read(array, dtype, key=key, client=client)
        for (key, dtype), array in zip(pairs, arrays, strict=True)
    }


def for_client(outgoing: Outgoing, round: int) -> tuple[Arrays, dict[str, str]]:
    """The arrays and the config that a client is sent in a round."""
    own = {} if outgoing.adapter is None else outgoing.adapter.state_dict()
    arrays, names = named_arrays(own)
    fields = outgoing_fields(outgoing, round) | {"tensors": names}
    if outgoing.merges:
        stacks = [named_arrays(stack.state_dict()) for _, stack in outgoing.merges]
        fields["merge-tensors"] = [its_names for _, its_names in stacks]
        arrays += [array for its_arrays, _ in stacks for array in its_arrays]
    return arrays, as_text(fields)


def read_received(arrays: Sequence[Any], config: Mapping[str, Any]) -> Received:
    """What a client was sent.

    Raises:
        InvalidInput: not by a strategy of FastAgg's.
    """
    fields = read_fields(config)
    if "round" not in fields:
        raise InvalidInput(
            "this config has nothing for FastAgg's client",
            field=FASTAGG,
            expected="the config of a FitIns or EvaluateIns of FastAggFedAvg",
            got=", ".join(config) or "an empty config",
        )
    remaining = iter(arrays)
    own = _next(remaining, fields["tensors"])
    text = read_config(fields)
    merges = zip(
        fields.get("merge-rounds", []),
        fields.get("merge-configs", []),
        fields.get("merge-tensors", []),
        strict=True,
    )
    return Received(
        fields["round"],
        fields.get("rank"),
        None if text is None else Adapter(own, text),
        tuple(
            (number, Adapter(_next(remaining, names), json.loads(its_text)))
            for number, its_text, names in merges
        ),
    )


def _next(arrays: Iterator[Any], names: Names) -> dict[str, torch.Tensor]:
    return named(list(islice(arrays, len(names))), names, from_array)
