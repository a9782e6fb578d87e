"""What a command prints: a JSON document or tables on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fastagg.folders.rounds import Progress


def print_json(document: Any) -> None:
    """One JSON document; not-a-number and infinity, which JSON has not, become null."""
    print(json.dumps(_finite(document), indent=2))


def console() -> Console:
    """Tables for people on stdout; wide enough when it is no terminal, so that none is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, emoji=False)


@contextmanager
def progress_bar(*, wanted: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr while the block runs, where stderr is a terminal.

    Yields:
        A function of (done, total, what).
    """
    if not wanted or not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield show


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what goes on, while the block runs, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(escape(text))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
