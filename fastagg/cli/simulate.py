"""`fastagg simulate`: federated fine-tuning, all clients in one process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from fastagg.cli.failures import INTERRUPTED, command, say
from fastagg.cli.options import Json
from fastagg.cli.printing import print_json


@command
def simulate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="The run's settings.", show_default=False)
    ],
    methods: Annotated[
        str | None, typer.Option(help="Methods to compare, such as flora,flexlora.", show_default=False)
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds in all.", show_default=False)] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Number of clients.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A Hugging Face id, a local folder, or 'embedded'.", show_default=False),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The clients' largest.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where clients train: cpu, cuda or auto.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of all random draws.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="OUT", help="The run's folder.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any setting by its dotted name, such as training.batch=4; may be given again.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last complete round.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Fine-tune a model with simulated clients, by one method or several.

    Ctrl-C ends the run after the client that is training; a second one ends it at once. Either way
    --resume goes on with the same bits. The methods run on the same clients, first adapters and batches.
    """
    from rich.console import Console

    from fastagg.federated.simulation.config import RunConfig
    from fastagg.federated.simulation.live import LiveView
    from fastagg.federated.simulation.run_folder import RunFolder
    from fastagg.federated.simulation.simulate import simulate as run_simulation

    named = {
        "federation.methods": methods,
        "federation.rounds": rounds,
        "data.clients": clients,
        "model.name": model,
        "training.learning_rate": learning_rate,
        "model.device": device,
        "seed": seed,
        "output.folder": out,
    }
    options = {name: str(value) for name, value in named.items() if value is not None}
    wanted = RunConfig.read(config, options | _parsed(settings or []))
    try:
        with _asked_to_stop() as stop, LiveView(Console(stderr=json_output)) as view:
            done = run_simulation(wanted, resume=resume, observer=view, stop=stop)
    except KeyboardInterrupt:
        done = False
    if not done:
        say("interrupted; --resume goes on after the last complete round")
        raise typer.Exit(INTERRUPTED)
    folder = Path(wanted.output.folder)
    runs = [folder / method for method in wanted.federation.methods]
    report = folder / "report.html" if wanted.output.plots else None
    if report is not None:
        _draw(runs, report)
    if json_output:
        last = {}
        for run in runs:
            lines = RunFolder(run).metrics()
            last[run.name] = [line for line in lines if line["kind"] == "round"][-1]
        written = None if report is None else str(report)
        print_json({"folder": str(folder), "methods": last, "report": written})
    elif report is not None:
        typer.echo(f"report: {report}")


def _draw(folders: list[Path], report: Path) -> None:
    """Each run's plots and page, and one page of them all."""
    from fastagg.federated.report.html_report import write_report
    from fastagg.federated.report.plots import write_plots
    from fastagg.federated.report.recorded_run import read_runs

    for folder, run in zip(folders, read_runs(folders), strict=True):
        write_plots(run, folder / "plots")
        write_report([folder], folder / "report.html")
    write_report(folders, report)


def _parsed(settings: list[str]) -> dict[str, str]:
    found = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
        found[name.strip()] = value.strip()
    return found


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed inside the block. The second time interrupts, as ever."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        say("ending after this client; press Ctrl-C again to end at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(simulate)
