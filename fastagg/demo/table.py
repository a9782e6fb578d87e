"""The tables that the demo prints; they fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from fastagg.demo.clients import Client
from fastagg.demo.outcome import HandOut, MethodOutcome, Outcome

# Relative distance below which only float32's rounding is left.
ROUNDING = 1e-6


def clients_table(clients: Sequence[Client], loss_before: float) -> Table:
    """Who trained what, and what it is worth alone: a row per client."""
    table = _table(
        "Clients: held-out loss with the base -> own adapter",
        ("client",),
        ("rank", "weight", "own text", "text of all"),
    )
    for c in clients:
        table.add_row(
            c.name,
            str(c.rank),
            str(c.weight),
            f"{c.own_before:.3f} -> {c.own_after:.3f}",
            f"{loss_before:.3f} -> {c.alone_on_all:.3f}",
        )
    return table


def methods_table(outcome: Outcome) -> Table:
    """A section per method, a row per rank handed out."""
    table = _table(
        "Methods: distance from dW in float64, held-out loss on the text of all",
        ("method", "to rank"),
        (
            "distance\nfrom dW",
            "least at\nits rank",
            "loss\nbefore",
            "loss\nafter",
            "bytes to\na client",
            "seconds",
        ),
    )
    before = f"{outcome.loss_before:.4f}"
    table.add_row("dW itself", "", "0", "", before, f"{outcome.loss_exact:.4f}", "", "")
    for method in outcome.methods:
        table.add_section()
        if method.refused is not None:
            table.add_row(method.method, "refused", *["-"] * 6)
        for i, hand_out in enumerate(method.hand_outs):
            table.add_row(
                method.method if i == 0 else "",
                receivers(hand_out),
                distance(hand_out),
                f"{hand_out.optimum:.4f}" if hand_out.optimum > ROUNDING else "0",
                before,
                f"{hand_out.loss:.4f}",
                f"{hand_out.nbytes:,}",
                f"{method.seconds:.2f}" if i == 0 else "",
            )
    return table


def receivers(hand_out: HandOut) -> str:
    """Whom a hand-out is for: "16 (x2)", or all of them for the stack."""
    if hand_out.stacked:
        return f"all: {hand_out.rank}"
    many = len(hand_out.clients)
    return f"{hand_out.rank} (x{many})" if many > 1 else str(hand_out.rank)


def distance(hand_out: HandOut) -> Text:
    """Green where it is the least that the rank allows, red where it is not."""
    excess = hand_out.distance - hand_out.optimum
    shown = f"{hand_out.distance:.1e}" if hand_out.distance < 1e-3 else f"{hand_out.distance:.4f}"
    return Text(shown, style="green" if excess < ROUNDING else "red")


def refusals(methods: Sequence[MethodOutcome]) -> list[str]:
    """A line for each method that refused, with its reason."""
    return [f"{m.method} refused: {m.refused}" for m in methods if m.refused is not None]


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
