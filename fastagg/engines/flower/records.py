"""Messages of Flower's Message API: what a node is sent, and what it answers.

To a node ``arrays`` (its adapter; empty: it starts with its own), ``config`` (the user's), ``fastagg``
(see :mod:`fastagg.engines.flower.fields`) and, for FLoRA, ``merge-3``: the stack of round 3. From a node
one ArrayRecord, one MetricRecord and, where it says more, ``fastagg``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fastagg.adapter import Adapter
from fastagg.engines.exchange import Outgoing
from fastagg.engines.flower.codec import decode
from fastagg.engines.flower.fields import FASTAGG, outgoing_fields, read_config
from fastagg.errors import InvalidInput

__all__ = [
    "Answer",
    "for_node",
    "merge_name",
    "own_fields",
    "read_answer",
    "read_metrics",
    "records_of",
]

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


@dataclass(frozen=True)
class Answer:
    """What a node trained: tensors, which are views of the message, and what they count."""

    tensors: Mapping[str, torch.Tensor]
    weight: float
    config: Mapping[str, Any] | None
    metrics: MetricRecord


def merge_name(round: int) -> str:
    """The name of the record of a round's stack."""
    return f"merge-{round}"


def own_fields(content: RecordDict) -> Mapping[str, Any]:
    """FastAgg's fields of a message or of a client's state; none where there are none."""
    return records_of(content, ConfigRecord).get(FASTAGG, {})


def records_of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """The records of one kind, by name.

    Flower's own ``content.array_records`` refers to itself, and so keeps a message with all its tensors
    until the garbage collector comes round.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def for_node(
    outgoing: Outgoing,
    round: int,
    arrays: str,
    records: Mapping[str, ConfigRecord],
    encoded: Callable[[Adapter], ArrayRecord],
) -> RecordDict:
    """What a node is sent.

    Args:
        round: the one that it takes part in.
        arrays: the name of the record of its adapter.
        records: the user's, by name.
        encoded: an adapter's tensors as a record.
    """
    own = outgoing.adapter
    content = RecordDict({arrays: ArrayRecord() if own is None else encoded(own), **records})
    for number, stack in outgoing.merges:
        content[merge_name(number)] = encoded(stack)
    content[FASTAGG] = ConfigRecord(outgoing_fields(outgoing, round))
    return content


def read_answer(message: Message, weighted_by: str, client: str) -> Answer:
    """What a node answers to a round of training.

    Raises:
        InvalidInput: not one record of arrays, no number to weigh it by, or a damaged record.
    """
    content = message.content
    found = list(records_of(content, ArrayRecord).values())
    if len(found) != 1:
        raise InvalidInput(
            "not the answer of a client that trained",
            client=client,
            field="arrays",
            expected="one ArrayRecord, of the adapter",
            got=f"{len(found)} of them",
        )
    weight, metrics = read_metrics(content, weighted_by, client)
    config = read_config(own_fields(content), client)
    return Answer(decode(found[0], client), weight, config, metrics)


def read_metrics(content: RecordDict, weighted_by: str, client: str) -> tuple[float, MetricRecord]:
    """What an answer counts, and its metrics.

    Raises:
        InvalidInput: no MetricRecord with that number.
    """
    for metrics in records_of(content, MetricRecord).values():
        weight = metrics.get(weighted_by)
        if isinstance(weight, (int, float)):
            return float(weight), metrics
    raise InvalidInput(
        "nothing says how much this answer counts",
        client=client,
        field=weighted_by,
        expected="a MetricRecord with this number",
        cure="Answer with train_reply(), or with the metric that weighted_by_key names",
    )
