"""A run as its folder tells it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from fastagg.errors import InvalidInput
from fastagg.federated.report.metrics import ClientRow, RoundRow, read_metrics

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Spectra(BaseModel):
    """modules: module -> the singular values of its dW, falling; those that follow are zero."""

    modules: Mapping[str, tuple[float, ...]]


class Similarity(BaseModel):
    """cosine: (clients, clients), of the clients' updates over all modules."""

    clients: tuple[str, ...]
    cosine: tuple[tuple[float | None, ...], ...]

    @model_validator(mode="after")
    def _square(self) -> Similarity:
        count = len(self.clients)
        if len(self.cosine) != count or any(len(row) != count for row in self.cosine):
            raise ValueError(f"cosine is not {count} x {count}")
        return self


@dataclass(frozen=True)
class RecordedRun:
    """What one method did.

    label: the run's name among those it is shown with.
    config: the text of config.toml, empty where there is none.
    spectra, similarity: of the last complete round that has them, with the number of that round.
    notes: what was found missing or damaged in the folder, for the reader.
    """

    label: str
    folder: Path
    method: str
    rounds: tuple[RoundRow, ...]
    clients: tuple[ClientRow, ...]
    config: str = ""
    spectra: tuple[int, Spectra] | None = None
    similarity: tuple[int, Similarity] | None = None
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[RoundRow, ...]:
        """The rounds in which clients trained: all but round 0."""
        return tuple(row for row in self.rounds if row.round > 0)

    @property
    def client_names(self) -> tuple[str, ...]:
        """In the order of their first row."""
        return tuple(dict.fromkeys(row.client for row in self.clients))

    def held_out_losses(self) -> dict[int, list[float]]:
        """round -> the finite held-out losses of its clients; rounds without any are left out."""
        losses: dict[int, list[float]] = {}
        for row in self.clients:
            if row.held_out_loss is not None and math.isfinite(row.held_out_loss):
                losses.setdefault(row.round, []).append(row.held_out_loss)
        return dict(sorted(losses.items()))

    def settings(self) -> dict[str, Any]:
        """Dotted name -> value of config.toml; empty where that is missing or no TOML."""
        try:
            return dict(_flat(tomllib.loads(self.config), ""))
        except tomllib.TOMLDecodeError:
            return {}


def read_runs(paths: Sequence[Path]) -> tuple[RecordedRun, ...]:
    """Runs, each labelled by as much of its path as tells it from the others.

    Args:
        paths: run folders, or folders of run folders (such as one that holds a run per method).

    Raises:
        InvalidInput: a path that is neither, or metrics that cannot be read.
    """
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in _run_folders(path)))
    return tuple(_read(folder, label) for folder, label in zip(folders, _labels(folders), strict=True))


def _run_folders(path: Path) -> list[Path]:
    if _is_run(path):
        return [path]
    inner = sorted(child for child in path.iterdir() if _is_run(child)) if path.is_dir() else []
    if not inner:
        raise InvalidInput(
            f"{path} is no run folder" if path.exists() else f"there is no {path}",
            expected="a folder with metrics.jsonl, or a folder of such folders",
            cure="`fastagg simulate` writes run folders",
        )
    return inner


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file()


def _labels(folders: Sequence[Path]) -> list[str]:
    depth = 1
    while True:
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
        depth += 1


def _read(folder: Path, label: str) -> RecordedRun:
    metrics = read_metrics(folder / "metrics.jsonl")
    methods = {row.method for row in metrics.rounds} | {row.method for row in metrics.clients}
    if len(methods) != 1:
        raise InvalidInput(
            f"{folder / 'metrics.jsonl'} is not of one run",
            field="method",
            expected="rows of one method",
            got=", ".join(sorted(methods)) or "no row",
        )
    notes = list(metrics.notes)
    config = folder / "config.toml"
    if not config.is_file():
        notes.append("there is no config.toml")
    return RecordedRun(
        label=label,
        folder=folder,
        method=methods.pop(),
        rounds=tuple(sorted(metrics.rounds, key=lambda row: row.round)),
        clients=metrics.clients,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        spectra=_latest(folder, "spectra.json", Spectra, notes),
        similarity=_latest(folder, "similarity.json", Similarity, notes),
        notes=tuple(notes),
    )


Document = TypeVar("Document", bound=BaseModel)


def _latest(
    folder: Path, name: str, kind: type[Document], notes: list[str]
) -> tuple[int, Document] | None:
    """A file of the last complete round that has it; a damaged one only leaves a note."""
    for path in sorted(folder.glob(f"rounds/*/{name}"), reverse=True):
        if not path.parent.name.isdigit() or not (path.parent / "COMPLETE").exists():
            continue
        try:
            return int(path.parent.name), kind.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            notes.append(f"{path.relative_to(folder)} cannot be read and was left out")
    return None


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
