"""How long a run will still take, judged by what its clients and its rounds took so far."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastagg.federated.simulation.events import (
    ClientFinished,
    ClientStep,
    Event,
    RoundFinished,
    RoundStarted,
    RunStarted,
)


class TimeLeft:
    """An observer that estimates the seconds left, of all methods.

    Training is taken apart from the rest of a round, which is evaluation above all: that is known from
    round 0 on, so that the first steps of the first client are enough for an estimate.
    """

    def __init__(self, methods: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._methods_after = methods
        self._rounds = 0
        self._rounds_left = 0  # of this method, with the one in progress
        self._participants = 0  # of the round in progress
        self._trained = 0  # those of them that are through
        self._begun = 0.0  # when the client in progress began
        self._part = 0.0  # how much of it is done
        self._clients = 0  # in all rounds that were watched
        self._training = 0.0  # the seconds that these took
        self._rests: list[float] = []

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._methods_after -= 1
                self._rounds, self._rounds_left = event.rounds, event.rounds - event.done
            case RoundStarted():
                self._participants, self._trained, self._part = len(event.participants), 0, 0.0
                self._begun = self._clock()
            case ClientStep():
                self._part = event.step / event.steps
            case ClientFinished():
                now = self._clock()
                self._training += now - self._begun
                self._begun, self._part = now, 0.0
                self._clients, self._trained = self._clients + 1, self._trained + 1
            case RoundFinished():
                self._rounds_left, self._trained = self._rounds - event.round, 0
                spent = event.line["seconds"]
                self._rests.append(sum(spent.values()) - spent["train"])

    def seconds(self) -> float | None:
        """None before a client has taken a step."""
        seen = self._clients + self._part
        if not seen:
            return None
        training = self._training + (self._clock() - self._begun if self._part else 0.0)
        rounds = self._rounds_left + self._methods_after * self._rounds
        clients = rounds * self._participants - self._trained - self._part
        rest = sum(self._rests) / len(self._rests) if self._rests else 0.0
        return clients * training / seen + (rounds + self._methods_after) * rest
