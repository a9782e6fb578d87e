"""`fastagg combine`: the saved states of servers into one, or into hand-outs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastagg.cli.aggregate import Accumulator, Device, Dtype, Route
from fastagg.cli.failures import command
from fastagg.cli.options import (
    Condense,
    Force,
    Json,
    OutOrState,
    State,
    check_one,
    check_ranks,
    parsed_ranks,
)
from fastagg.cli.printing import console, print_json, print_state, progress_bar


@command
def combine(
    states: Annotated[
        list[Path],
        typer.Argument(
            metavar="STATE..",
            help="Files that `fastagg aggregate --state` or this command wrote.",
            show_default=False,
        ),
    ],
    out: OutOrState = None,
    state: State = None,
    condense: Condense = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            callback=check_ranks,
            metavar="4,8",
            help="Hand out adapters of these ranks instead of the clients' own.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.auto,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="8GiB",
            help="What the accumulator and the work may take together. Default: any.",
            show_default=False,
        ),
    ] = None,
    accumulator: Annotated[
        Accumulator, typer.Option(help="stack keeps factors, dense keeps dW; auto takes the smaller.")
    ] = Accumulator.auto,
    route: Annotated[Route, typer.Option(help="The decomposition.")] = Route.auto,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of what is handed out. Default: each client's own.", show_default=False),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the randomized decomposition.")
    ] = 0,
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Merge the states of a tree's servers: into one state for the next level, or into OUT at the root.

    A state holds all that hand-outs need, so each client gets its own. Without --condense the tree is
    exact; with it, what is sent stays one adapter, and the error is in `report.json`.
    """
    from fastagg.folders.states import hand_out_states, state_of_states

    check_one(out, state, condense, ranks)
    options: dict[str, Any] = {
        "device": device.value,
        "max_memory": max_memory,
        "accumulator": accumulator.value,
        "route": route.value,
        "dtype": None if dtype is None else dtype.value,
        "seed": seed,
    }
    with progress_bar() as progress:
        if state is not None:
            saved = state_of_states(
                states, state, condense=condense, force=force, progress=progress, **options
            )
        else:
            assert out is not None
            wanted = None if ranks is None else parsed_ranks(ranks)
            report = hand_out_states(
                states, out, ranks=wanted, force=force, progress=progress, **options
            )
    if state is not None:
        print_state(saved, as_json=json_output)
    elif json_output:
        print_json({"out": str(out), **report.to_dict()})
    else:
        from fastagg.cli.report_tables import report_tables

        console().print(*report_tables(report, str(out)), sep="\n")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(combine)
