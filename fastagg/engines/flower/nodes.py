"""Which node is which client: node ids are of a run, names outlive it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from fastagg.engines.exchange import Exchange
from fastagg.engines.flower.fields import Introduction
from fastagg.errors import InvalidInput
from fastagg.rounds.options import check_choice

__all__ = ["Ask", "Node", "Nodes", "given_ranks"]

Node = int | str
"""A node id of the Message API, or the cid of a client of the older one."""

Ask = Callable[[Collection[Node]], Iterable[tuple[Node, Introduction | InvalidInput]]]
"""Asks nodes who they are; those that do not answer are left out."""


def given_ranks(ranks: Mapping[Any, int] | str) -> dict[str, int]:
    """The ranks that a strategy's user gives: node id, or the name of a client -> rank; none, where
    nodes are asked or answer.

    Raises:
        InvalidInput: neither a mapping nor "query" or "reply".
    """
    if isinstance(ranks, str):
        check_choice("ranks", ranks, ("query", "reply"))
        return {}
    return {str(node): rank for node, rank in ranks.items()}


class Nodes:
    """The nodes that were met in this run, each under the name of its client.

    Args:
        exchange: where clients are enrolled.
        ranks: node id, or name of a client -> rank, where the server decides on it.
        asking: nodes are asked who they are; otherwise each is called by its id.
    """

    def __init__(self, exchange: Exchange, ranks: Mapping[str, int], asking: bool) -> None:
        self._exchange = exchange
        self._ranks = ranks
        self._asking = asking
        self._names: dict[Node, str] = {}
        self._asked: set[Node] = set()

    def meet(
        self, nodes: Collection[Node], ask: Ask, present: Callable[[], Iterable[Node]]
    ) -> tuple[dict[Node, str], dict[str, str]]:
        """Enrols those that were not met yet, and asks them first who they are, but for those whose rank
        is given by their ids.

        Others that are connected are asked once with them: a round's outcome is cut to the ranks that
        are known when it ends, and who comes later gets what is left of it.

        Args:
            nodes: those that are to take part.
            present: the nodes that are connected.

        Returns:
            node -> client, and client -> why its node takes no part: it did not answer, says what
            cannot be, or another node that is connected has its name.
        """
        refused: dict[Node, tuple[str, str]] = {}
        connected = set(present())
        # A client may have come back as another node.
        self._names = {node: name for node, name in self._names.items() if node in connected}
        others = connected - self._asked if self._asking else set()
        unknown = [node for node in {*nodes, *others} if node not in self._names]
        asked = {node for node in unknown if self._asking and str(node) not in self._ranks}
        self._asked |= asked
        for node in sorted(set(unknown) - asked, key=str):
            self._admit(node, Introduction(), refused)
        silent = set(asked)
        for node, introduction in ask(frozenset(asked)) if asked else ():
            silent.discard(node)
            if isinstance(introduction, InvalidInput):
                refused[node] = str(node), str(introduction)
            else:
                self._admit(node, introduction, refused)
        refused |= {node: (str(node), "has not answered who it is") for node in silent}
        return (
            {node: self._names[node] for node in nodes if node in self._names},
            dict(refused[node] for node in nodes if node in refused),
        )

    def _admit(
        self, node: Node, introduction: Introduction, refused: dict[Node, tuple[str, str]]
    ) -> None:
        client = introduction.client or str(node)
        if client in self._names.values():
            reason = "another node that is connected has the name of this client"
            refused[node] = f"{client} ({node})", reason
            return
        rank, config = self._ranks.get(str(node), self._ranks.get(client)), None
        if rank is None:
            rank, config = introduction.rank, introduction.config
        try:
            if rank is not None or config is not None or client not in self._exchange.clients:
                self._exchange.enrol(client, config, rank=rank)
        except InvalidInput as error:
            refused[node] = client, str(error)
            return
        self._exchange.merged_through(client, introduction.merged_through)
        self._names[node] = client
