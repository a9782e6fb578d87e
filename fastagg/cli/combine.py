"""`fastagg combine`: the saved states of servers into one, or into hand-outs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastagg.cli.aggregator_options import (
    Accumulator,
    Adding,
    By,
    Device,
    HandedOutAs,
    MaxMemory,
    OnDevice,
    Ranks,
    Route,
    Seed,
    options_of,
)
from fastagg.cli.failures import command
from fastagg.cli.options import (
    Condense,
    Force,
    Json,
    OutOrState,
    State,
    check_one,
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
    ranks: Ranks = None,
    device: OnDevice = Device.auto,
    max_memory: MaxMemory = None,
    accumulator: Adding = Accumulator.auto,
    route: By = Route.auto,
    dtype: HandedOutAs = None,
    seed: Seed = 0,
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Merge the states of a tree's servers: into one state for the next level, or into OUT at the root.

    A state holds all that hand-outs need, so each client gets its own. Without --condense the tree is
    exact; with it, what is sent stays one adapter, and the error is in `report.json`.
    """
    from fastagg.folders.states import hand_out_states, state_of_states

    check_one(out, state, condense, ranks)
    options = options_of(device, max_memory, accumulator, route, dtype, seed)
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
