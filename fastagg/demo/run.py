"""The demo from end to end: its settings, the federated loop, the report, and what came of it."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from rich.console import Console

from fastagg.cli.comparison_tables import print_comparison
from fastagg.demo.preset import METHODS, preset
from fastagg.demo.received import Received, received, received_table
from fastagg.errors import FastAggError
from fastagg.federated.report.compare import compare
from fastagg.federated.report.pages import write_pages
from fastagg.federated.report.run_summary import RunSummary
from fastagg.federated.simulation.live import LiveView
from fastagg.federated.simulation.simulate import simulate

SETTINGS = "demo.toml"  # also the mark by which a later demo knows the folder as its own
AGAIN = "again"  # where the commands at the end aggregate to


@dataclass(frozen=True)
class Outcome:
    """A finished demo; what ``dataclasses.asdict`` makes of it is JSON-able.

    runs: each method's headline figures.
    received: what clients have after the first round.
    """

    report: str
    runs: tuple[RunSummary, ...]
    received: tuple[Received, ...]
    seconds: float


def run_demo(
    out: Path, *, seed: int = 0, quick: bool = False, console: Console | None = None
) -> Outcome:
    """Runs the loop by each method, writes its report, and prints what came of it.

    Everything lies under ``out`` afterwards: ``demo.toml``, a run folder per method, and
    ``report.html``; those of an earlier demo are replaced. Nothing is fetched: the text is the
    standard library's. Some minutes on two cores; seconds with ``quick``. The same seed gives the same
    adapters, bit for bit, on the same machine and number of threads.

    Raises:
        FastAggError: ``out`` holds something else, or this Python lacks the sources of its library.
        KeyboardInterrupt: `fastagg simulate demo.toml --resume` goes on.
    """
    started = time.perf_counter()
    console = console or Console()
    config = preset(out, seed=seed, quick=quick)
    _claim(out)
    (out / SETTINGS).write_text(config.to_toml(), encoding="utf-8")
    with LiveView(console, len(METHODS)) as view:
        view.say(
            f"{config.data.clients} clients, {config.federation.rounds} rounds by each of "
            f"{', '.join(METHODS)}"
        )
        simulate(config, observer=view)
    comparison = compare([out / method for method in METHODS])
    report = write_pages(comparison, out)
    found = received(comparison.runs)
    print_comparison(comparison, console)
    console.print(received_table(found))
    outcome = Outcome(str(report), comparison.summaries, found, time.perf_counter() - started)
    console.print(_ending(out, outcome), highlight=False, markup=False, soft_wrap=True)
    return outcome


def _ending(out: Path, outcome: Outcome) -> str:
    """Commands to go on with, and where the report lies."""
    first = quote(str(out / "flexlora" / "rounds" / "0001"))
    again, settings = quote(str(out / AGAIN)), quote(str(out / SETTINGS))
    return f"""
{outcome.seconds:.0f} seconds. To look into the clients' adapters of round 1, to aggregate them by hand,
and to let all clients train for two more rounds:
  fastagg inspect {first}/updates/*
  fastagg aggregate {first}/updates/* --weights {first}/weights.json --method flexlora --out {again}
  fastagg simulate {settings} --rounds 4 --resume

report: {outcome.report}"""


def _claim(out: Path) -> None:
    """Makes ``out`` an empty demo folder, over an earlier demo's but over nothing else."""
    if out.exists() and not out.is_dir():
        raise FastAggError(f"{out} is a file; give the demo another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise FastAggError(
            f"{out} exists and is not a demo's; give another folder with --out, or empty it"
        )
    for folder in (*METHODS, AGAIN):
        shutil.rmtree(out / folder, ignore_errors=True)
    for file in ("report.html", "comparison.png"):
        (out / file).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
