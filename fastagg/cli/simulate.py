"""`fastagg simulate`: federated fine-tuning, all clients on one machine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from fastagg.cli.failures import INTERRUPTED, command, say
from fastagg.cli.options import Json
from fastagg.cli.printing import console, print_json
from fastagg.cli.setting_options import CONTEXT, SettingsCommand, given_settings


@command
def simulate(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.toml",
            help="Settings; options win over it, and what is in neither has its default.",
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
    from fastagg.federated.simulation.events import to_all
    from fastagg.federated.simulation.live import LiveView
    from fastagg.federated.simulation.quiet import quiet_libraries
    from fastagg.federated.simulation.simulate import simulate as run_simulation
    from fastagg.federated.simulation.trackers import Trackers

    quiet_libraries()
    options = given_settings(context)
    wanted = RunConfig.of({}, options) if config is None else RunConfig.read(config, options)
    methods = wanted.federation.methods
    try:
        with (
            _asked_to_stop() as stop,
            LiveView(Console(stderr=json_output), len(methods)) as view,
            Trackers(wanted) as trackers,
        ):
            observer = to_all(trackers, view)
            if not run_simulation(wanted, resume=resume, observer=observer, stop=stop):
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        say("interrupted; --resume goes on after the last complete round")
        raise typer.Exit(INTERRUPTED) from None
    _present(Path(wanted.output.folder), methods, plots=wanted.output.plots, json_output=json_output)


def _present(folder: Path, methods: Sequence[str], *, plots: bool, json_output: bool) -> None:
    """The runs side by side: drawn into their folder, and printed."""
    from fastagg.cli.comparison_tables import print_comparison
    from fastagg.federated.report.compare import compare

    comparison = compare([folder / method for method in methods])
    report = None
    if plots:
        from fastagg.federated.report.pages import write_pages

        report = write_pages(comparison, folder)
    if json_output:
        last = {run.method: run.rounds[-1].model_dump(mode="json") for run in comparison.runs}
        written = None if report is None else str(report)
        print_json({"folder": str(folder), "methods": last, "report": written})
        return
    screen = console()
    print_comparison(comparison, screen)
    if report is not None:
        screen.print(f"report: {report}", markup=False, soft_wrap=True)


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
    app.command(cls=SettingsCommand, context_settings=CONTEXT)(simulate)
