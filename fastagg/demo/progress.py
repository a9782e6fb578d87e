"""Stages with a bar each where someone watches, and a line each where nobody does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Stages:
    """Calls of it are the stages of a run, one at a time; ``seconds`` keeps how long each took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, steps: int) -> Iterator[Callable[[], None]]:
        """A stage of so many steps; the block calls what it is given after each."""
        started = time.perf_counter()
        bar = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task(name, total=steps)
            yield lambda: bar.advance(task)
        self.seconds[name] = time.perf_counter() - started

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(escape(line), highlight=False, soft_wrap=True)
