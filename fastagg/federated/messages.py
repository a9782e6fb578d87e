"""What passes between a server and its clients, whatever the transport; a client answers with a
:class:`fastagg.ClientUpdate`."""

from __future__ import annotations

from dataclasses import dataclass

from fastagg.adapter import Adapter
from fastagg.errors import FastAggError


@dataclass(frozen=True)
class Handout:
    """What a client begins a round with.

    round: the round that begins, from 1.
    adapter: what the server made of the round before; None in the first.
    merge: the client adds the adapter to its base weights and trains a fresh one (FLoRA); otherwise it
        goes on from the adapter, which is of its own rank.
    """

    round: int
    adapter: Adapter | None = None
    merge: bool = False


class ClientFailure(FastAggError):
    """A client that has no update to give this round, and why."""

    def __init__(self, client: str, round: int, reason: str) -> None:
        super().__init__(f"client {client}, round {round}: {reason}")
        self.client = client
        self.round = round
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return ClientFailure, (self.client, self.round, self.reason)
