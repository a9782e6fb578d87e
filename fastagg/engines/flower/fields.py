"""What travels beside the tensors, whatever the API: FastAgg's fields, and what is in them.

To a client: ``round``, ``rank``, ``adapter-config`` (JSON) of its adapter, and ``merge-rounds`` and
``merge-configs`` of the stacks that it merges first (FLoRA).

From a client, whatever of it it cares to say: ``client`` (a name that outlives the run), ``rank``,
``adapter-config``, ``merged-through``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastagg.engines.exchange import Outgoing
from fastagg.errors import InvalidInput, short
from fastagg.peft_format.config import AdapterConfig

__all__ = [
    "FASTAGG",
    "Introduction",
    "config_text",
    "introduce",
    "outgoing_fields",
    "read_config",
    "read_introduction",
]

FASTAGG = "fastagg"


@dataclass(frozen=True)
class Introduction:
    """What a client says of itself before it trains; None is what it does not say.

    Attributes:
        client: its name.
        rank: the rank that it trains;  config: all fields of its ``adapter_config.json``.
        merged_through: the last round whose stack it has merged (FLoRA).
    """

    client: str | None = None
    rank: int | None = None
    config: Mapping[str, Any] | None = None
    merged_through: int = 0


def outgoing_fields(outgoing: Outgoing, round: int) -> dict[str, Any]:
    """The fields of what a client is sent; ``round`` is the one that it takes part in."""
    own, merges = outgoing.adapter, outgoing.merges
    fields: dict[str, Any] = {"round": round}
    if own is not None:
        fields["rank"] = max(slot.rank for slot in own.layout.slots)
        fields["adapter-config"] = config_text(own.config)
    if merges:
        fields["merge-rounds"] = [number for number, _ in merges]
        fields["merge-configs"] = [config_text(stack.config) for _, stack in merges]
    return fields


def introduce(
    client: str | None, rank: int | None, config: Any, merged_through: int
) -> dict[str, Any]:
    """The fields of an introduction; see :class:`Introduction`."""
    text = None if config is None else config_text(config)
    said = {"client": client, "rank": rank, "adapter-config": text, "merged-through": merged_through}
    return {name: value for name, value in said.items() if value is not None}


def read_introduction(fields: Mapping[str, Any]) -> Introduction:
    """What a client says of itself.

    Raises:
        InvalidInput: a field that is not what it should be.
    """
    client = _field(fields, "client", str)
    if client is not None and not client.strip():
        raise InvalidInput("a client needs a name", field="client", got=short(client))
    return Introduction(
        client,
        _field(fields, "rank", int),
        read_config(fields),
        _field(fields, "merged-through", int) or 0,
    )


def config_text(config: Any) -> str:
    """The fields of an ``adapter_config.json`` as one JSON text.

    Args:
        config: an AdapterConfig, a ``peft.LoraConfig``, or the fields.

    Raises:
        InvalidInput: not a LoRA configuration that can be aggregated.
    """
    if not isinstance(config, AdapterConfig):
        config = AdapterConfig.from_dict(config if isinstance(config, Mapping) else config.to_dict())
    return json.dumps(dict(config.raw))


def read_config(fields: Mapping[str, Any], client: str | None = None) -> dict[str, Any] | None:
    """The fields of an ``adapter_config.json``, None where none were sent.

    Raises:
        InvalidInput: not a JSON object.
    """
    text = _field(fields, "adapter-config", str, client)
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable("adapter-config", "a JSON object", f"{short(text)}: {error}", client) from None
    if not isinstance(config, dict):
        raise _unreadable("adapter-config", "a JSON object", short(config), client)
    return config


def _field(fields: Mapping[str, Any], name: str, kind: type, client: str | None = None) -> Any:
    value = fields.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise _unreadable(name, kind.__name__, short(value), client)
    return value


def _unreadable(field: str, expected: str, got: str, client: str | None) -> InvalidInput:
    return InvalidInput(
        "what the client says cannot be read", client=client, field=field, expected=expected, got=got
    )
