"""A run's rounds in TensorBoard and Weights & Biases, beside its own metrics.jsonl.

Both log a method for itself, with the round as the step: TensorBoard in METHOD/tensorboard, W&B as a run
whose files are in METHOD/wandb. A run that goes on goes on there as well. What was missed, by a kill or
because a tracker was not wanted before, is read from metrics.jsonl.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

from fastagg.errors import FastAggError, InvalidInput
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.events import Event, RoundFinished, RunStarted
from fastagg.federated.simulation.run_folder import Line, RunFolder
from fastagg.whole_file import write_whole

Scalars = Mapping[str, float]


class Log(Protocol):
    """One method's, in one tracker; made of the run's settings and the method's folder."""

    def write(self, round_number: int, scalars: Scalars) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class Trackers:
    """An observer, inside its `with` block, that logs rounds where ``output.trackers`` says.

    Raises:
        InvalidInput: one of them is not installed.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._open = [_OPENED[name] for name in config.output.trackers]
        self._logs: list[Log] = []
        for name in config.output.trackers:
            _refuse_missing(name)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(failed=kind is not None)

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._close(failed=False)
                folder = RunFolder(Path(self._config.output.folder) / event.method)
                for opened in self._open:
                    self._logs.append(opened(self._config, folder.path))
                for number, lines in _by_round(folder.metrics() if event.done else []):
                    self._write(number, lines)
            case RoundFinished():
                self._write(event.round, [event.line, *event.clients])

    def _write(self, number: int, lines: Iterable[Line]) -> None:
        scalars = dict(_scalars(lines))
        for log in self._logs:
            log.write(number, scalars)

    def _close(self, *, failed: bool) -> None:
        with ExitStack() as closing:  # all of them, whatever one of them says
            while self._logs:
                closing.callback(self._logs.pop().close, failed=failed)


class _TensorBoard:
    """Rounds are few: all are written anew when a run goes on, and those before are purged."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=0)

    def write(self, round_number: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, round_number)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Such a run cannot be written anew: beside its files are its id and the last round that it has."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        import wandb

        self._state = folder / "wandb" / "run.json"
        state = json.loads(self._state.read_text()) if self._state.exists() else {}
        self._id: str = state.get("id", secrets.token_hex(4))
        self._last: int = state.get("round", -1)
        folder.joinpath("wandb").mkdir(exist_ok=True)
        try:
            self._run = wandb.init(
                project=config.output.project,
                id=self._id,
                resume="allow",
                name=folder.name,
                group=Path(config.output.folder).resolve().name,
                dir=folder,
                config=RunConfig.read(folder / "config.toml").model_dump(mode="json"),
                allow_val_change=True,  # the number of rounds, when a run goes on
                # Its capture of the terminal and the bars' would be in each other's way.
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise FastAggError(
                f"Weights & Biases began no run: {str(error).rstrip('.')}. Log in (wandb login), or "
                "set WANDB_MODE=offline"
            ) from error

    def write(self, round_number: int, scalars: Scalars) -> None:
        if round_number <= self._last:
            return
        self._run.log(dict(scalars), step=round_number)
        self._last = round_number
        write_whole(self._state, json.dumps({"id": self._id, "round": round_number}))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


_OPENED: Mapping[str, Callable[[RunConfig, Path], Log]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}


def _refuse_missing(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise InvalidInput(
            f"{name} cannot be imported: {error}",
            field="output.trackers",
            cure="pip install 'fastagg[tracking]'",
        ) from None


def _by_round(lines: Iterable[Line]) -> Iterator[tuple[int, list[Line]]]:
    found: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        found[line["round"]].append(line)
    yield from sorted(found.items())


def _scalars(lines: Iterable[Line]) -> Iterator[tuple[str, float]]:
    """Name -> number, those of clients in groups by what they are, such as ``train_loss/NAME``."""
    for line in lines:
        if line["kind"] == "round":
            named = {name: line[name] for name in ("loss", "perplexity", "exact_match", "rouge_l")}
            named |= {"participants": line["participants"], "failures": len(line["failures"])}
            named |= {f"seconds/{phase}": spent for phase, spent in line["seconds"].items()}
            named |= {"bytes/up": line["bytes_up"], "bytes/down": line["bytes_down"]}
        else:
            of_client = ("train_loss", "held_out_loss")
            named = {f"{name}/{line['client']}": line[name] for name in of_client}
        yield from ((name, value) for name, value in named.items() if value is not None)
