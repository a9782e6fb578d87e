"""The live view: lines where nobody watches, bars in a terminal, and names that look like markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fastagg.federated.simulation.events import (
    ClientFinished,
    ClientStep,
    Event,
    RoundFinished,
    RoundStarted,
    RunStarted,
)
from fastagg.federated.simulation.live import LiveView

LINE = {
    "round": 1,
    "loss": 1.25,
    "exact_match": None,
    "rouge_l": 0.5,
    "participants": 1,
    "failures": {"[red]": "no [power]"},
    "seconds": {"train": 1.0, "other": 0.5},
}
EVENTS: tuple[Event, ...] = (
    RunStarted("flora", 2, ("[red]", "b"), 0),
    RoundStarted(1, ("[red]", "b")),
    ClientStep(1, "[red]", 1, 4, 2.5),
    ClientFinished(1, "[red]", None, "no [power]"),
    ClientFinished(1, "b", 2.0, None),
    RoundFinished(1, LINE),
)


def shown(*, terminal: bool) -> str:
    file = io.StringIO()
    with LiveView(Console(file=file, force_terminal=terminal, width=120)) as view:
        for event in EVENTS:
            view(event)
    return file.getvalue()


def test_lines_alone_where_nobody_watches() -> None:
    assert shown(terminal=False).splitlines() == [
        "flora: 2 clients, 2 rounds",
        "  round 1: no [power]",
        "  round 1, held-out loss 1.2500, ROUGE-L 0.500, 1 clients, 1 failed, 1.5 s",
    ]


@pytest.mark.parametrize("text", ["[red]", "loss 2.500", "round 1, held-out loss 1.2500", "2/2", "4"])
def test_bars_in_a_terminal(text: str) -> None:
    assert text in shown(terminal=True)
