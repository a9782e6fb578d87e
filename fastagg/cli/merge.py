"""`fastagg merge`: an adapter into a checkpoint."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastagg.cli.failures import command, say
from fastagg.cli.options import Force, Json, Out
from fastagg.cli.printing import console, print_json, progress_bar


class Tied(str, Enum):
    """What happens to a weight that the input embedding and the output head share."""

    keep = "keep"
    untie = "untie"


@command
def merge(
    base: Annotated[
        Path,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The model folder: safetensors, one file or shards with an index.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        Path,
        typer.Option(
            "--adapter",
            metavar="FOLDER",
            help="The adapter folder; OUT/rank-16 or OUT/stacked of `fastagg aggregate` will do.",
            show_default=False,
        ),
    ],
    out: Out,
    tied: Annotated[
        Tied,
        typer.Option(
            help="Where the adapter targets the embedding or the head of a model whose head shares "
            "the embedding's weight: keep changes both, as PEFT's merge_and_unload does; untie "
            "gives the head a weight of its own, so that the model computes what the adapter did."
        ),
    ] = Tied.keep,
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Add an adapter's delta weights into a model's checkpoint, shard by shard.

    No model is instantiated; one tensor is in memory at a time. The new folder has the base's shards,
    keys and dtypes, and a copy of its other files (weights in other formats and hidden files are left
    out). Sums are taken in float32 and rounded once.
    """
    from fastagg.checkpoint import merge_into_checkpoint

    with progress_bar() as progress:
        report = merge_into_checkpoint(
            base, adapter, out, force=force, tied=tied.value, progress=progress
        )
    for note in report.notes:
        say(f"note: {note}")
    if json_output:
        print_json(report.to_dict())
        return
    from fastagg.cli.tables import merge_table

    console().print(merge_table(report))


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(merge)
