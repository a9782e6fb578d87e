"""`fastagg aggregate`: folders in, folders out."""

from __future__ import annotations

import difflib
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from fastagg.cli.failures import command, say
from fastagg.cli.options import (
    Condense,
    Folders,
    Force,
    Json,
    OutOrState,
    State,
    check_one,
    parsed_ranks,
)
from fastagg.cli.printing import console, print_json, print_state, progress_bar
from fastagg.cli.ranks import is_alone, is_first, process_group

if TYPE_CHECKING:
    from fastagg.report import Report, SkippedClient

# The files of the package, listed: importing it would import torch for `--help`.
_METHODS = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "methods").glob("*.py")
    if not path.stem.startswith("_")
)


class Missing(str, Enum):
    """What a module counts for that a client lacks."""

    renormalise = "renormalise"
    zero = "zero"


def _method(name: str) -> str:
    if name in _METHODS:
        return name
    near = difflib.get_close_matches(name, _METHODS, n=1, cutoff=0.0)
    raise typer.BadParameter(f"{name!r} is none of {', '.join(_METHODS)}; did you mean {near[0]!r}?")


@command
def aggregate(
    folders: Folders,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            callback=_method,
            metavar="METHOD",
            help=f"How to aggregate: {', '.join(_METHODS)}.",
            show_default=False,
        ),
    ],
    out: OutOrState = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What each client counts, as a rule its number of examples: JSON "
            '{"client": weight}, a JSON list in the order of the folders, or CSV lines '
            "client,weight. Default: all alike.",
            show_default=False,
        ),
    ] = None,
    ranks: Ranks = None,
    device: OnDevice = Device.auto,
    max_memory: MaxMemory = None,
    missing: Annotated[
        Missing,
        typer.Option(
            help="Modules that a client lacks: divide by the weights of those that have them, or "
            "count an update of zero."
        ),
    ] = Missing.renormalise,
    accumulator: Adding = Accumulator.auto,
    route: By = Route.auto,
    dtype: HandedOutAs = None,
    seed: Seed = 0,
    state: State = None,
    condense: Condense = None,
    skip_invalid: Annotated[
        bool,
        typer.Option(
            "--skip-invalid",
            help="Leave invalid clients out and go on; they are named on stderr and in the report.",
        ),
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Under torchrun, how long a process waits for the others before it gives up and names "
            "who is missing; longer than the slowest takes for its modules.",
        ),
    ] = 300,
    force: Force = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Validate everything, show the plan (memory, routes, folders), write nothing; under "
            "torchrun too the plan of one process.",
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Aggregate clients' LoRA adapters of different ranks into OUT.

    OUT holds a folder that PEFT loads for each distinct set of ranks among the clients (flora:
    `stacked/`), `clients.json`, which maps each client to its folder, and `report.json`.

    A client is named after its folder; where names clash, after as much of its path as tells them
    apart: `a/adapter` and `b/adapter`.

    `torchrun --nproc-per-node 8 -m fastagg aggregate ..` shares the modules out among the processes, on
    one machine or several with one file system: each reads, holds and computes its own (`--max-memory`
    is each one's), and OUT has the bytes that one process would write.
    """
    check_one(out, state, condense, ranks)
    if state is not None and not is_alone():
        raise typer.BadParameter("--state is for one process: run it without torchrun")
    if dry_run and out is None:
        raise typer.BadParameter("--dry-run is for --out: it shows what would be handed out")
    from fastagg.aggregator import Aggregator
    from fastagg.errors import InvalidInput

    options = options_of(device, max_memory, accumulator, route, dtype, seed)
    options["missing"] = missing.value
    wanted = None if ranks is None else parsed_ranks(ranks)
    try:
        handout = Aggregator(method, **options).method.handout
        if wanted is not None and not handout.ranked:
            handout.check_rank(wanted[0], wanted[0])
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from None
    if dry_run and out is not None:
        if is_first():
            _preview(folders, method, out, weights, wanted, skip_invalid, force, options, json_output)
        return
    if state is not None:
        _save_state(folders, method, state, weights, condense, skip_invalid, force, options, json_output)
        return
    assert out is not None
    from fastagg.folders.rounds import aggregate_folders

    with process_group(device.value, timeout, as_json=json_output) as group:
        with progress_bar(wanted=is_first()) as progress:
            report = aggregate_folders(
                folders,
                out,
                method=method,
                weights=weights,
                ranks=wanted,
                skip_invalid=skip_invalid,
                force=force,
                progress=progress,
                process_group=group,
                **options,
            )
        if is_first():
            _show(report, out, json_output)


def _show(report: Report, out: Path, json_output: bool) -> None:
    _name_skipped(report.skipped)
    if json_output:
        print_json({"out": str(out), **report.to_dict()})
        return
    from fastagg.cli.report_tables import report_tables

    console().print(*report_tables(report, str(out)), sep="\n")


def _preview(
    folders: list[Path],
    method: str,
    out: Path,
    weights: Path | None,
    ranks: list[int] | None,
    skip_invalid: bool,
    force: bool,
    options: dict[str, Any],
    json_output: bool,
) -> None:
    from fastagg.folders.preview import preview
    from fastagg.folders.rounds import FolderRound
    from fastagg.peft_format.output_folder import check_free, check_room

    check_free(out, force=force, reading=folders)
    round_ = FolderRound(folders, method=method, weights=weights, skip_invalid=skip_invalid, **options)
    round_.plan()
    with progress_bar() as progress:
        round_.validate(progress)
    found = preview(round_, out, ranks)
    check_room(out, sum(folder.bytes for folder in found.folders))
    _name_skipped(found.skipped)
    if json_output:
        print_json(found.to_dict())
        return
    from fastagg.cli.report_tables import preview_tables

    console().print(*preview_tables(found), sep="\n")


def _save_state(
    folders: list[Path],
    method: str,
    state: Path,
    weights: Path | None,
    condense: int | None,
    skip_invalid: bool,
    force: bool,
    options: dict[str, Any],
    json_output: bool,
) -> None:
    from fastagg.folders.states import state_of_folders

    with progress_bar() as progress:
        saved = state_of_folders(
            folders,
            state,
            method=method,
            weights=weights,
            condense=condense,
            skip_invalid=skip_invalid,
            force=force,
            progress=progress,
            **options,
        )
    _name_skipped(saved.skipped)
    print_state(saved, as_json=json_output)


def _name_skipped(skipped: Any) -> None:
    clients: list[SkippedClient] = list(skipped)
    for client in clients:
        say(f"left out {client.client}: {client.reason}")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(aggregate)
