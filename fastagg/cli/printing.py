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
    from fastagg.folders.states import StateReport


def print_json(document: Any) -> None:
    """One JSON document; not-a-number and infinity, which JSON has not, become null."""
    print(json.dumps(_finite(document), indent=2))


def print_state(saved: StateReport, *, as_json: bool) -> None:
    """A state that was written."""
    if as_json:
        print_json(saved.to_dict())
        return
    from fastagg.byte_sizes import format_bytes
    from fastagg.cli.tables import facts

    rows = {
        "written": f"{saved.state}: {format_bytes(saved.bytes)}",
        "clients": len(saved.clients),
        "held": saved.accumulator
        + ("" if saved.condensed is None else f", condensed to rank {saved.condensed}"),
        "left out": ", ".join(client.client for client in saved.skipped) or "-",
    }
    console().print(facts(f"State of a round of {saved.method}", rows))


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
