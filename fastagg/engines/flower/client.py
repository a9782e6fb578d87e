"""The side of a ClientApp: what a message holds for it, and what it answers.

    @app.train()
    def train(message, context):
        received = receive(message, context)
        model = get_peft_model(received.merge_into(base_model()), LoraConfig(r=received.rank or 8))
        ...
        tensors = get_peft_model_state_dict(model)
        return train_reply(message, tensors, model.peft_config["default"], examples)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fastagg.adapter import Adapter
from fastagg.engines.flower.codec import decode, encode
from fastagg.engines.flower.fields import FASTAGG, config_text, introduce, read_config
from fastagg.engines.flower.records import merge_name, own_fields, records_of
from fastagg.errors import InvalidInput
from fastagg.update import ClientUpdate

__all__ = ["Received", "evaluate_reply", "query_reply", "receive", "train_reply"]

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True, eq=False)
class Received:
    """What a client is sent.

    Attributes:
        round: the round that it takes part in, from 1.
        rank: the largest of its adapter's modules; None where it has no adapter yet.
        adapter: what it goes on from, at its own ranks; None: it starts with one of its own.
        merges: (round, stack) that it adds to its base weights first, the oldest first (FLoRA).
    """

    round: int
    rank: int | None
    adapter: Adapter | None
    merges: tuple[tuple[int, Adapter], ...] = ()

    def merge_into(self, model: Model) -> Model:
        """Adds the stacks to a base model's weights, in place, and returns it.

        Raises:
            InvalidInput: a model that lacks a module, or has another shape.
        """
        from fastagg.whole_round import aggregate

        for number, stack in self.merges:
            update = ClientUpdate(stack, client_id=f"round {number}")
            aggregate([update], "flora").merge_into(model)
        return model


def receive(message: Message, context: Context | None = None) -> Received:
    """Reads what the strategy sent for training or evaluation.

    Args:
        context: keeps the stacks of all rounds in ``context.state``, and ``merges`` are all of them, for
            a client that builds its base model anew for every message, as in a simulation. None:
            ``merges`` are those that the message holds, which may be more than the last time's; a client
            that keeps its base model has to skip those that it has merged.

    Raises:
        InvalidInput: not a message of FastAgg's strategy, or a damaged one.
    """
    fields = own_fields(message.content)
    if "round" not in fields:
        raise InvalidInput(
            "this message has nothing for FastAgg's client",
            field=FASTAGG,
            expected="a message of FastAggStrategy",
            got=", ".join(message.content) or "an empty message",
        )
    config = read_config(fields)
    merges = {merge_name(number) for number in fields.get("merge-rounds", [])}
    arrays = records_of(message.content, ArrayRecord)
    (own,) = (record for name, record in arrays.items() if name not in merges)
    adapter = None if config is None else Adapter(decode(own), config)
    source = message.content if context is None else _remembered(context, message.content)
    return Received(fields["round"], fields.get("rank"), adapter, _stacks(source))


def query_reply(
    message: Message,
    context: Context | None = None,
    *,
    client: str | None = None,
    rank: int | None = None,
    config: Any = None,
    merged_through: int = 0,
) -> Message:
    """The answer of a node that is asked who it is, before it trains.

    Args:
        context: as :func:`receive` was given it.
        client: a name by which the node is known in the next run too, whatever its node id is then.
        rank: the rank that it trains, with the rest of the strategy's initial adapter's configuration.
        config: all of its configuration, a ``peft.LoraConfig`` or the fields of one.
        merged_through: the last round whose stack a client that keeps its base model has merged.
    """
    if context is not None:
        merged_through = max(own_fields(context.state).get("merge-rounds", []), default=0)
    fields = ConfigRecord(introduce(client, rank, config, merged_through))
    return Message(RecordDict({FASTAGG: fields}), reply_to=message)


def train_reply(
    message: Message,
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    examples: float,
    metrics: Mapping[str, float] | None = None,
    *,
    arrays: str = "arrays",
    weighted_by: str = "num-examples",
) -> Message:
    """The answer of a client that has trained.

    Args:
        tensors: the adapter's, as ``get_peft_model_state_dict`` gives them, of any dtype.
        config: what they were trained with, a ``peft.LoraConfig`` or the fields of one; None: that of
            the adapter which the client was sent.
        examples: how much the update counts;  weighted_by: its name, the strategy's weighted_by_key.
        metrics: numbers, which the strategy averages.
    """
    content = RecordDict({arrays: encode(tensors), "metrics": _metrics(examples, metrics, weighted_by)})
    if config is not None:
        content[FASTAGG] = ConfigRecord({"adapter-config": config_text(config)})
    return Message(content, reply_to=message)


def evaluate_reply(
    message: Message,
    examples: float,
    metrics: Mapping[str, float] | None = None,
    *,
    weighted_by: str = "num-examples",
) -> Message:
    """The answer of a client that has evaluated; arguments as of :func:`train_reply`."""
    return Message(RecordDict({"metrics": _metrics(examples, metrics, weighted_by)}), reply_to=message)


def _metrics(examples: float, metrics: Mapping[str, float] | None, weighted_by: str) -> MetricRecord:
    return MetricRecord({**(metrics or {}), weighted_by: examples})


def _stacks(content: RecordDict) -> tuple[tuple[int, Adapter], ...]:
    """(round, stack) of all that a message, or a state, holds."""
    fields = own_fields(content)
    numbered = zip(fields.get("merge-rounds", []), fields.get("merge-configs", []), strict=True)
    arrays = records_of(content, ArrayRecord)
    return tuple(
        (number, Adapter(decode(arrays[merge_name(number)]), json.loads(config)))
        for number, config in numbered
    )


def _remembered(context: Context, content: RecordDict) -> RecordDict:
    """The client's state with the stacks of a message, each round's once.

    Raises:
        InvalidInput: a round between those that are kept and those that came is missing.
    """
    state, came = context.state, own_fields(content)
    kept = {name: list(own_fields(state).get(name, [])) for name in ("merge-rounds", "merge-configs")}
    rounds, configs = kept["merge-rounds"], kept["merge-configs"]
    for number, config in zip(came.get("merge-rounds", []), came.get("merge-configs", []), strict=True):
        if number <= len(rounds):
            continue
        if number > len(rounds) + 1:
            raise InvalidInput(
                "the stacks of earlier rounds are missing",
                field="merge-rounds",
                expected=f"round {len(rounds) + 1} to come next",
                got=f"round {number}",
                cure="Answer queries with query_reply(message, context): it says what is kept",
            )
        rounds.append(number)
        configs.append(config)
        state[merge_name(number)] = content[merge_name(number)]
    if rounds:
        state[FASTAGG] = ConfigRecord({"merge-rounds": rounds, "merge-configs": configs})
    return state
