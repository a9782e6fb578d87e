"""Asks nodes of the Message API who they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from logging import INFO

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from fastagg.engines.flower.fields import FASTAGG, Introduction, read_introduction
from fastagg.engines.flower.nodes import Node
from fastagg.engines.flower.records import own_fields
from fastagg.errors import InvalidInput

__all__ = ["ask"]


def ask(
    nodes: Collection[Node], grid: Grid, round: int, timeout: float
) -> Iterator[tuple[Node, Introduction | InvalidInput]]:
    """What each node says of itself, as the answers arrive: see ``query_reply``.

    A node that answers with an error, of a ClientApp without a query function as a rule, says nothing.
    """
    content = RecordDict({FASTAGG: ConfigRecord({"round": round})})
    messages = [Message(content, int(node), MessageType.QUERY) for node in nodes]
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node = reply.metadata.src_node_id
        if node not in nodes:
            continue
        if reply.has_error():
            log(INFO, "Node %d does not say who it is: %s", node, reply.error.reason)
            yield node, Introduction()
            continue
        try:
            yield node, read_introduction(own_fields(reply.content))
        except InvalidInput as error:
            yield node, error
