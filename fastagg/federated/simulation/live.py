"""A simulation as it is watched in a terminal: a line a round that stays, and bars that move."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from fastagg.federated.simulation.events import (
    ClientFinished,
    ClientStep,
    Event,
    PreTrainingStep,
    RoundFinished,
    RoundStarted,
    RunStarted,
)
from fastagg.federated.simulation.time_left import TimeLeft


class LiveView:
    """An observer of a run of so many methods, inside its `with` block. Where nobody watches, it prints
    lines alone."""

    def __init__(self, console: Console, methods: int = 1) -> None:
        self._console = console
        self._time_left = TimeLeft(methods)
        self._bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rounds = self._bars.add_task("preparing", total=None, note="")
        self._clients = self._bars.add_task("", total=None, note="", visible=False)
        self._steps = self._bars.add_task("", total=None, note="", visible=False)
        self._client: str | None = None

    def __enter__(self) -> LiveView:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        self._time_left(event)
        self._show(event)
        left = self._time_left.seconds()
        if left is not None:
            self._bars.update(self._rounds, note=f"{timedelta(seconds=round(left))} left in all")

    def _show(self, event: Event) -> None:
        match event:
            case PreTrainingStep():
                if event.step == 1:
                    self.say(f"training the embedded model first, {event.steps} steps")
                self._bars.update(self._rounds, total=event.steps, completed=event.step)
            case RunStarted():
                after = f", after round {event.done}" if event.done else ""
                self.say(f"{event.method}: {len(event.clients)} clients, {event.rounds} rounds{after}")
                self._begin(self._rounds, event.method, event.rounds)
                self._bars.update(self._rounds, completed=event.done)
            case RoundStarted():
                self._begin(self._clients, f"round {event.round}", len(event.participants))
            case ClientStep():
                if event.client != self._client:
                    self._client = event.client
                    self._begin(self._steps, escape(event.client), event.steps)
                self._bars.update(self._steps, completed=event.step, note=f"loss {event.loss:.3f}")
            case ClientFinished():
                self._bars.advance(self._clients)
                self._client = None
                if event.failure is not None:
                    self.say(f"  round {event.round}, client {event.client}: {event.failure}")
            case RoundFinished():
                self._bars.update(self._rounds, completed=event.round)
                self.say(f"  {_sentence(event.line)}")

    def _begin(self, bar: TaskID, description: str, total: int) -> None:
        """A bar, and its time, from the start."""
        self._bars.reset(bar, description=description, total=total, visible=True)

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(escape(line), highlight=False, soft_wrap=True)


def _sentence(line: Mapping[str, Any]) -> str:
    parts = [f"round {line['round']}"]
    if line["loss"] is not None:
        parts.append(f"held-out loss {line['loss']:.4f}")
    for name, field in (("exact match", "exact_match"), ("ROUGE-L", "rouge_l")):
        if line[field] is not None:
            parts.append(f"{name} {line[field]:.3f}")
    if line["round"]:
        many = line["participants"]
        parts.append(f"{many} client{'s' * (many != 1)}")
    if line["failures"]:
        parts.append(f"{len(line['failures'])} failed")
    parts.append(f"{sum(line['seconds'].values()):.1f} s")
    return ", ".join(parts)
