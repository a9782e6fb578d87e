"""The lines of metrics.jsonl, and the clock that times a round for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastagg.federated.clients.token_loss import TokenLoss
from fastagg.federated.clients.training import TrainingOutcome
from fastagg.federated.simulation import evaluation
from fastagg.federated.simulation.evaluation import Answers, Distance
from fastagg.federated.simulation.run_folder import Line


class Clock:
    """Seconds by what they were spent on, since it was made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._spent = dict.fromkeys(("train", "aggregate", "evaluate"), 0.0)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Times the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """By phase; ``other`` is the rest."""
        whole = time.perf_counter() - self._begun
        return self._spent | {"other": whole - sum(self._spent.values())}


@dataclass
class ClientRecord:
    """What is known of a client in a round.

    rank: of its adapter, but for modules that have one of their own; None without an adapter.
    """

    name: str
    rank: int | None
    outcome: TrainingOutcome | None = None
    held_out: TokenLoss | None = None
    distance: Distance | None = None
    bytes_up: int = 0
    bytes_down: int = 0

    def line(self, method: str, round: int) -> Line:
        """As metrics.jsonl has it."""
        trained, distance = self.outcome, self.distance
        return {
            "kind": "client",
            "method": method,
            "round": round,
            "client": self.name,
            "rank": self.rank,
            "participated": trained is not None,
            "train_loss": _finite(trained.loss) if trained else None,
            "steps": trained.steps if trained else 0,
            "held_out_loss": _finite(self.held_out.mean) if self.held_out else None,
            "distance": distance.received if distance else None,
            "optimal_distance": distance.optimal if distance else None,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "train_seconds": trained.seconds if trained else 0.0,
        }


@dataclass
class RoundRecord:
    """What is known of a round; 0 is before any.

    failures: client -> its last one, in any attempt at the round.
    """

    method: str
    round: int
    clients: dict[str, ClientRecord]
    clock: Clock = field(default_factory=Clock)
    failures: dict[str, str] = field(default_factory=dict)
    answers: Answers | None = None
    scored: tuple[str, ...] = ()

    def lines(self) -> list[Line]:
        """The round's own, then one for each client."""
        records = self.clients.values()
        losses = [record.held_out for record in records if record.held_out is not None]
        whole = evaluation.together(losses)
        answers = self.answers
        own = {
            "kind": "round",
            "method": self.method,
            "round": self.round,
            "loss": _finite(whole.mean),
            "perplexity": _finite(evaluation.perplexity(whole)),
            "participants": sum(record.outcome is not None for record in records),
            "failures": dict(self.failures),
            "exact_match": answers.exact_match if answers and "exact-match" in self.scored else None,
            "rouge_l": answers.rouge_l if answers and "rouge-l" in self.scored else None,
            "seconds": self.clock.seconds(),
            "bytes_up": sum(record.bytes_up for record in records),
            "bytes_down": sum(record.bytes_down for record in records),
        }
        return [own, *(record.line(self.method, self.round) for record in records)]


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
