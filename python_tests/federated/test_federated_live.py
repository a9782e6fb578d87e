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
from fastagg.federated.simulation.time_left import TimeLeft

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
        "  round 1, client [red]: no [power]",
        "  round 1, held-out loss 1.2500, ROUGE-L 0.500, 1 client, 1 failed, 1.5 s",
    ]


@pytest.mark.parametrize(
    "text",
    ["preparing", "[red]", "loss 2.500", "round 1, held-out loss 1.2500", "2/2", "4", " left in all"],
)
def test_bars_in_a_terminal(text: str) -> None:
    assert text in shown(terminal=True)


class Clock:
    """Seconds that pass when it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_that_of_all_methods() -> None:
    """A client takes 10 s, and what is around the training of a round 4 s."""
    clock = Clock()
    left = TimeLeft(methods=2, clock=clock)
    estimates = []
    for method in ("flora", "flexlora"):
        left(RunStarted(method, 2, ("a", "b"), 0))
        clock.now += 4
        left(RoundFinished(0, LINE | {"seconds": {"train": 0.0, "evaluate": 4.0}}))
        for number in (1, 2):
            left(RoundStarted(number, ("a", "b")))
            for client in ("a", "b"):
                clock.now += 5
                left(ClientStep(number, client, 1, 2, 2.5))
                estimates.append((clock.now, left.seconds()))
                clock.now += 5
                left(ClientFinished(number, client, 2.0, None))
                estimates.append((clock.now, left.seconds()))
            clock.now += 4
            left(RoundFinished(number, LINE | {"seconds": {"train": 20.0, "evaluate": 4.0}}))
            estimates.append((clock.now, left.seconds()))
    assert clock.now == 104
    assert [seconds for _, seconds in estimates] == [104 - now for now, _ in estimates]


def test_the_time_left_of_a_run_that_goes_on_and_repeats_a_round() -> None:
    clock = Clock()
    left = TimeLeft(methods=1, clock=clock)
    left(RunStarted("flora", 4, ("a", "b", "c"), 2))
    left(RoundStarted(3, ("a", "b")))
    assert left.seconds() is None
    clock.now = 10
    left(ClientFinished(3, "a", None, "lost"))
    assert left.seconds() == 30
    left(RoundStarted(3, ("b", "c")))
    assert left.seconds() == 40
