"""``python -m bench.federated``: federated methods on the same clients, and what the simulation costs.

Every method at every learning rate under every seed, each in a run folder that ``fastagg compare``
reads; a run that is complete there is not run again. Several rates keep the comparison fair: what
one method's average shrinks, a larger rate may make up for. Then the rounds of ``simulate`` beside the
clients' bare training steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import federated_handouts, federated_losses, simulate_overhead
from fastagg.bench.machine import describe
from fastagg.errors import InvalidInput
from fastagg.federated.data.examples import read_clients
from fastagg.federated.report.recorded_run import read_runs
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.live import LiveView
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.federated.simulation.simulate import simulate

CONFIG = Path(__file__).with_name("natural_instructions.toml")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options, runs what is not there yet, and prints and records the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.federated", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the clients' files")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the runs' settings")
    parser.add_argument("--seeds", type=_numbers(int), default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument(
        "--rates", type=_numbers(float), help="learning rates, such as 1e-3,1e-2; default: the settings'"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="seeds may run side by side, in processes of one each"
    )
    parser.add_argument(
        "--repetitions", type=int, default=3, help="of the measurement of simulate's cost; 0: none"
    )
    parser.add_argument("--record", type=Path, help="write the record here as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = {
        **describe(torch.device("cpu")).model_dump(exclude_none=True),
        "threads": options.threads,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n", flush=True)
    base = RunConfig.read(options.config, {"data.path": str(options.data)})
    weights = {each.name: len(each.train) for each in read_clients(options.data, seed=0)}
    losses, handouts = [], []
    for rate in options.rates or [base.training.learning_rate]:
        folders = {seed: options.out / f"rate-{rate:g}" / f"seed-{seed}" for seed in options.seeds}
        for seed, folder in folders.items():
            own = {"seed": seed, "training.learning_rate": rate, "output.folder": folder}
            _complete(_with(base, own | {"output.keep": "all", "output.plots": False}))
        methods = base.federation.methods
        runs = {seed: read_runs([folder / m for m in methods]) for seed, folder in folders.items()}
        losses.append(federated_losses.compared(rate, runs, weights))
        if federated_handouts.EXACT in methods:
            handouts.append(federated_handouts.compared(rate, folders, methods))
    results = [*losses, *handouts]
    print(f"\n{federated_losses.table(losses)}", end="\n\n", flush=True)
    if handouts:
        print(federated_handouts.table(handouts), end="\n\n", flush=True)
    if options.repetitions:
        cost = simulate_overhead.run(base, base.federation.methods, options.repetitions)
        print(simulate_overhead.table(cost), flush=True)
        results.append(cost)
    if options.record:
        # Where the clients' files lay says nothing of what was run.
        settings = base.model_dump(mode="json", exclude={"output": True, "data": {"path"}})
        document = {"schema": 1, "machine": about, "settings": settings, "results": results}
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(document, indent=1) + "\n")


def _complete(config: RunConfig) -> None:
    """Runs the methods whose rounds are not all there; the base model is trained for these alone."""
    missing = tuple(method for method in config.federation.methods if not _is_complete(config, method))
    if not missing:
        return
    print(f"seed {config.seed}, learning rate {config.training.learning_rate:g}", flush=True)
    with LiveView(Console()) as view:
        simulate(_with(config, {"federation.methods": ",".join(missing)}), resume=True, observer=view)


def _is_complete(config: RunConfig, method: str) -> bool:
    """Whether a run has all its rounds.

    Raises:
        InvalidInput: it has them, but by other settings.
    """
    folder = RunFolder(Path(config.output.folder) / method)
    if folder.last_complete() < config.federation.rounds:
        return False
    of_run = RunConfig.read(folder.path / "config.toml")
    own = _with(config, {"federation.methods": method})
    if of_run.model_dump(exclude={"output"}) != own.model_dump(exclude={"output"}):
        raise InvalidInput(
            f"the run in {folder.path} had other settings", cure="Give another folder with --out"
        )
    return True


def _with(config: RunConfig, options: dict[str, Any]) -> RunConfig:
    return RunConfig.of(config.model_dump(), {name: str(value) for name, value in options.items()})


def _numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    def numbers(text: str) -> list[float]:  # argparse names it in its error
        return [kind(part) for part in text.split(",")]

    return numbers


if __name__ == "__main__":
    main()
