"""`fastagg bench`: the ops beside what their users would write, and beside what the machine can do."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastagg.cli.failures import BAD_INPUT, INTERRUPTED, command, say
from fastagg.cli.options import Json
from fastagg.cli.printing import console, print_json, status_line

if TYPE_CHECKING:
    from fastagg.bench.record import Record
    from fastagg.bench.suite import Pair


class FactorDtype(str, Enum):
    """Of the clients' factors."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Factors(str, Enum):
    """How the clients' factors are drawn."""

    random = "random"
    signal = "signal"


bench = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="[COMMAND]",
)


@bench.callback()
@command
def run(
    context: typer.Context,
    case: Annotated[
        list[str] | None,
        typer.Option(
            "--case",
            metavar="NAME",
            help="A case, or a pattern such as 'square-*', repeatable; `fastagg bench cases` lists all.",
            show_default=False,
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op",
            metavar="NAME",
            help="stack, reconstruct, merge, svd, redistribute, round, update_gram, end-to-end, import; "
            "repeatable. All by default.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: does it hold at all?")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Every case, more turns, more of each model: hours.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or cuda:1.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, help="On a CPU; torch's number by default.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        FactorDtype, typer.Option("--dtype", help="Of the clients' factors.")
    ] = FactorDtype.bfloat16,
    factors: Annotated[
        Factors,
        typer.Option(
            "--factors",
            help="random: Gaussian, a flat spectrum, the hard case. signal: the clients share one that "
            "decays.",
        ),
    ] = Factors.random,
    seed: Annotated[int, typer.Option("--seed", help="Of the factors.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Write record.json and the plots there; an older record there is replaced.",
            show_default=False,
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Measure every op beside its baselines and the machine's limits, time and error side by side.

    What is measured, and how, stands in the record: two runs with fresh inputs, contenders in turn,
    medians and quartiles, and the noise between the runs. Baselines that are too slow are timed on
    fewer modules and scaled, and marked so.
    """
    if context.invoked_subcommand is not None:
        return
    if quick and full:
        raise typer.BadParameter("expected one of --quick and --full, got both")
    import torch

    from fastagg.bench.record import Settings, write_record
    from fastagg.bench.suite import pairs
    from fastagg.bench.suite import run as measured
    from fastagg.cli.bench_tables import machine_lines, print_table

    effort = "quick" if quick else "full" if full else "standard"
    wanted = pairs(case or [], op or [], effort)
    settings = Settings(
        device=device,
        threads=threads or torch.get_num_threads(),
        effort=effort,
        dtype=dtype.value,
        factors=factors.value,
        seed=seed,
    )
    screen = None if json_output else console()

    measured_pairs: list[Pair] = []

    def done(record: Record, pair: Pair) -> None:
        measured_pairs.append(pair)
        if out is not None:
            write_record(out / "record.json", record)
        if screen is not None:
            if len(record.tables()) == 1:
                screen.print(*machine_lines(record), sep="\n", markup=False)
            print_table(record, pair.case.name, pair.operation.name, screen)

    try:
        with status_line() as saying:
            record = measured(wanted, settings, say=saying, done=done)
    except KeyboardInterrupt:
        if out is None or not measured_pairs:
            raise
        say(f"interrupted; {out / 'record.json'} has what was measured until then")
        raise typer.Exit(INTERRUPTED) from None
    if json_output:
        print_json(record.model_dump())
    if out is not None:
        _draw(record, out)


def _draw(record: Record, out: Path) -> None:
    from fastagg.bench.plots import draw

    for path in draw(record, out):
        print(f"written: {path}", file=sys.stderr)
    print(f"written: {out / 'record.json'}", file=sys.stderr)


@bench.command("cases")
@command
def cases(json_output: Json = False) -> None:
    """List the cases: what each aggregates."""
    from fastagg.bench.cases import CASES
    from fastagg.cli.bench_tables import case_table

    if json_output:
        print_json(
            {
                name: {
                    "about": case.about,
                    "clients": case.clients,
                    "modules": case.modules,
                    "rows": case.rows,
                }
                for name, case in CASES.items()
            }
        )
        return
    console().print(case_table())


@bench.command("plot")
@command
def plot(
    record: Annotated[
        Path, typer.Argument(metavar="RECORD", help="A record of `fastagg bench`.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where the pictures go.")
    ] = Path("."),
) -> None:
    """Draw a record's plots again."""
    from fastagg.bench.plots import draw
    from fastagg.bench.record import read_record

    for path in draw(read_record(record), out):
        print(f"written: {path}")


@bench.command("compare")
@command
def compare(
    old: Annotated[
        Path, typer.Argument(metavar="OLD", help="A record of `fastagg bench`.", show_default=False)
    ],
    new: Annotated[
        Path, typer.Argument(metavar="NEW", help="A later one.", show_default=False)
    ],
    json_output: Json = False,
) -> None:
    """Tell what got slower, or less accurate, from one record to another, beyond the noise of both.

    Exits with 1 where a row of FastAgg did. Baselines and limits are compared too: where they moved,
    the machine did, or torch.
    """
    from fastagg.bench.compare import compare as compared
    from fastagg.bench.record import read_record
    from fastagg.cli.bench_comparison import print_comparison

    found = compared(read_record(old), read_record(new))
    if json_output:
        print_json(found.document())
    else:
        print_comparison(found, console())
    if found.worse:
        raise typer.Exit(BAD_INPUT)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.add_typer(bench, name="bench")
