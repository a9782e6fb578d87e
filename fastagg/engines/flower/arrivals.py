"""A grid from which replies come one by one, as they arrive."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from logging import WARNING
from typing import Any

from flwr.app import Message
from flwr.common import log
from flwr.serverapp import Grid

__all__ = ["Arrivals"]

# How long nothing is asked where nothing has arrived: doubled from one to the other, in seconds.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0


class Arrivals(Grid):
    """A grid whose ``send_and_receive`` yields replies while others are still due.

    Flower's own collects all replies before a strategy sees the first. This one sends and pulls message
    by message, and holds no reply once it was yielded; all else is the grid's.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Sends the messages, then yields replies as they arrive, until all came or time is up.

        Messages are sent before the first reply is asked for; time counts from then on.
        """
        pending = self._sent(messages)
        return self._replies(pending, None if timeout is None else time.monotonic() + timeout)

    def _sent(self, messages: Iterable[Message]) -> list[str]:
        pending = []
        for message in messages:
            node = message.metadata.dst_node_id
            sent = [name for name in self._grid.push_messages([message]) if name]
            if not sent:
                log(WARNING, "A message to node %d could not be sent", node)
            pending.extend(sent)
        return pending

    def _replies(self, pending: list[str], deadline: float | None) -> Iterator[Message]:
        pause = _SHORTEST_PAUSE
        while pending:
            waiting = []
            for name in pending:
                # One reply at a time: all that are there might not fit into memory together.
                found = list(self._grid.pull_messages([name]))
                if not found:
                    waiting.append(name)
                    continue
                yield found.pop()
            if len(waiting) < len(pending):
                pause = _SHORTEST_PAUSE
            pending = waiting
            now = time.monotonic()
            if not pending or (deadline is not None and now >= deadline):
                return
            time.sleep(pause if deadline is None else min(pause, deadline - now))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def set_run(self, run: Any) -> None:
        """As the grid's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As the grid's."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As the grid's."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """As the grid's."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """As the grid's."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid's."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid's."""
        return self._grid.pull_messages(message_ids)
