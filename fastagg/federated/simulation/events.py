"""What a simulation tells those who watch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreTrainingStep:
    """The embedded model took a step of the training before all rounds."""

    step: int
    steps: int


@dataclass(frozen=True)
class RunStarted:
    """A method begins, after the rounds that are ``done`` already."""

    method: str
    rounds: int
    clients: tuple[str, ...]
    done: int


@dataclass(frozen=True)
class RoundStarted:
    """A round begins with these clients."""

    round: int
    participants: tuple[str, ...]


@dataclass(frozen=True)
class ClientStep:
    """A client took a step of training."""

    round: int
    client: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class ClientFinished:
    """A client's update came in, or failed: ``failure`` is the reason."""

    round: int
    client: str
    loss: float | None
    failure: str | None


@dataclass(frozen=True)
class RoundFinished:
    """A round is complete and on disk; round 0 is before any.

    line, clients: its own line of metrics.jsonl, and one of each client.
    """

    round: int
    line: Mapping[str, Any]
    clients: Sequence[Mapping[str, Any]] = ()


Event = PreTrainingStep | RunStarted | RoundStarted | ClientStep | ClientFinished | RoundFinished
Observer = Callable[[Event], None]


def to_all(*observers: Observer) -> Observer:
    """One observer for several; they are told in this order."""

    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    return tell
