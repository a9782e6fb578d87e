"""The folder of one run of one method, from which it can go on after any interruption.

config.toml
metrics.jsonl                   one JSON object a line, of kind "round" or "client"
rounds/0003/updates/NAME/       what the clients sent, as PEFT folders; weights.json: their examples
            adapters/NAME/      what each client is handed next, or where all merge the same: merged/
            weights.safetensors the base weights of the next round, where clients train all of them
            state.safetensors   the server after the round
            spectra.json, similarity.json
            COMPLETE            empty, and written last: without it the round never was
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastagg.errors import InvalidInput
from fastagg.federated.simulation.config import RunConfig
from fastagg.whole_file import write_whole

COMPLETE = "COMPLETE"

Line = Mapping[str, Any]


class RunFolder:
    """Reads and writes such a folder; each file appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Whether a run of this configuration may begin here, or go on; nothing is changed.

        Raises:
            InvalidInput: a folder that is there without ``resume``, or whose run had other settings.
        """
        if not (self.path / "config.toml").exists():
            # A kill may have come while the first file was written, beside its place.
            if self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise self._refusal("is not empty, and no run")
        elif not resume:
            raise self._refusal("holds a run already")
        else:
            self._check_same(RunConfig.read(self.path / "config.toml"), config)

    def open(self, config: RunConfig, *, resume: bool) -> int:
        """Makes the folder, or goes on with it; returns the last complete round, 0 if there is none.

        What an interruption left of later rounds is removed, lines of metrics among them.

        Raises:
            InvalidInput: see :meth:`check`.
        """
        self.check(config, resume=resume)
        write_whole(self.path / "config.toml", config.to_toml())
        last = self.last_complete()
        for left_over in self.path.glob(".*.????????"):  # of whole_file
            left_over.unlink()
        for folder in self._round_folders():
            if int(folder.name) > last:
                shutil.rmtree(folder)
        kept = [line for line in self.metrics() if last and line["round"] <= last]
        write_whole(self._metrics, _as_text(kept))
        if config.output.keep == "last":
            for number in range(1, last + 1):
                self.forget_updates(number)
                if number < last:
                    self.forget_state(number)
        return last

    def round(self, number: int) -> Path:
        """The folder of a round."""
        return self.path / "rounds" / f"{number:04d}"

    def update(self, number: int, client: str) -> Path:
        """Where a client's update of a round is, or goes."""
        return self.round(number) / "updates" / client

    def adapter(self, number: int, client: str) -> Path:
        """The adapter that a client is handed after a round."""
        return self.round(number) / "adapters" / client

    def merged(self, number: int) -> Path:
        """The one adapter that all clients merge after a round."""
        return self.round(number) / "merged"

    def weights(self, number: int) -> Path:
        """The base weights after a round, of methods that change them otherwise."""
        return self.round(number) / "weights.safetensors"

    def begin_round(self, number: int) -> Path:
        """An empty folder for a round; what an attempt before it left is removed."""
        folder = self.round(number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def complete_round(self, number: int, lines: Iterable[Line]) -> None:
        """Adds a round's lines to the metrics and marks it complete."""
        self.add_metrics(lines)
        if number:
            write_whole(self.round(number) / COMPLETE, "")

    def last_complete(self) -> int:
        """The last round that is complete, as are all before it."""
        last = 0
        while (self.round(last + 1) / COMPLETE).exists():
            last += 1
        return last

    def metrics(self) -> list[dict[str, Any]]:
        """All lines, as written, but for one that a kill cut off."""
        if not self._metrics.exists():
            return []
        whole, _, _ = self._metrics.read_text("utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def add_metrics(self, lines: Iterable[Line]) -> None:
        """Puts lines after those that are there; no round counts before its COMPLETE is written, and
        lines of other rounds are dropped when the folder is opened."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(_as_text(lines))
            file.flush()
            os.fsync(file.fileno())

    def forget_updates(self, number: int) -> None:
        """Removes what the clients sent in a round."""
        shutil.rmtree(self.round(number) / "updates", ignore_errors=True)

    def forget_state(self, number: int) -> None:
        """Removes what a later round has no use for: all but what was merged, which is the base's."""
        shutil.rmtree(self.round(number) / "adapters", ignore_errors=True)
        self.weights(number).unlink(missing_ok=True)
        (self.round(number) / "state.safetensors").unlink(missing_ok=True)

    def _round_folders(self) -> list[Path]:
        return sorted(path for path in (self.path / "rounds").glob("*") if path.name.isdigit())

    def _check_same(self, before: RunConfig, now: RunConfig) -> None:
        """Of a run's settings, only the number of its rounds and what it leaves may change."""
        old, new = _flat(before.model_dump()), _flat(now.model_dump())
        for name in sorted(old):
            if name.startswith("output.") or name == "federation.rounds":
                continue
            if old[name] != new[name]:
                raise InvalidInput(
                    f"the run in {self.path} had another setting",
                    field=name,
                    expected=old[name],
                    got=new[name],
                    cure="Resume with the run's own settings, or choose another output.folder",
                )

    def _refusal(self, what: str) -> InvalidInput:
        return InvalidInput(
            f"{self.path} {what}",
            field="output.folder",
            cure="Go on with its run (--resume), or choose another folder",
        )


def _as_text(lines: Iterable[Line]) -> str:
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
