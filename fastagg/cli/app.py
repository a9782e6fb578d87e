"""The `fastagg` command and its subcommands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fastagg.cli import (
    aggregate,
    bench,
    combine,
    compare,
    demo,
    info,
    inspect,
    merge,
    simulate,
    validate,
)
from fastagg.cli.failures import INTERRUPTED, say, unwind_on_termination
from fastagg.cli.ranks import leaving

app = typer.Typer(
    name="fastagg",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Exact server-side aggregation of LoRA adapters of different ranks.",
    epilog="Exit codes: 0 done, 1 bad input, 2 bad usage, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastagg.info import version

        typer.echo(f"fastagg {version('fastagg') or 'not installed'}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Exact server-side aggregation of LoRA adapters of different ranks."""


for module in (aggregate, combine, merge, inspect, validate, simulate, compare, bench, info, demo):
    module.register(app)


def main() -> None:
    """The entry point of the `fastagg` command."""
    unwind_on_termination()
    with leaving():
        try:
            app()
        except KeyboardInterrupt:
            say("interrupted; nothing was written")
            sys.exit(INTERRUPTED)
