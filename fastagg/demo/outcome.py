"""What a run of the demo found, as numbers; ``table.py`` shows them to people."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from fastagg.demo.clients import Client


@dataclass(frozen=True)
class HandOut:
    """What the clients of one rank receive.

    rank: of the clients; of the stack itself where ``stacked``.
    distance: |received - dW| / |dW| in float64, over all modules.
    optimum: the smallest distance an adapter of that rank can have.
    loss: nats per byte on the held-out text of all clients.
    nbytes: of the adapter file that each of ``clients`` is sent.
    """

    rank: int
    clients: tuple[str, ...]
    folder: str
    distance: float
    optimum: float
    loss: float
    nbytes: int
    stacked: bool = False


@dataclass(frozen=True)
class MethodOutcome:
    """One method: its hand-outs, or why it refused.

    seconds: from the clients' folders to the method's folder.
    """

    method: str
    seconds: float = 0.0
    hand_outs: tuple[HandOut, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished demo; what ``dataclasses.asdict`` makes of it is JSON-able.

    Losses are in nats per byte, on the held-out text of all clients.

    loss_before: of the base model. loss_exact: with the float64 dW added to its weights.
    seconds: by stage.
    """

    seed: int
    parameters: int
    loss_before: float
    loss_exact: float
    clients: tuple[Client, ...]
    methods: tuple[MethodOutcome, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes all of it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
