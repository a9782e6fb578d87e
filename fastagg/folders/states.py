"""A tree of servers by files: folders to a state, states to a state or to folders."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastagg.aggregator import Aggregator
from fastagg.errors import InvalidInput
from fastagg.folders.rounds import FolderRound, Progress, Weights
from fastagg.method import Method
from fastagg.peft_format.output_folder import check_free
from fastagg.report import Report, SkippedClient
from fastagg.rounds import state_file

__all__ = ["StateReport", "hand_out_states", "state_of_folders", "state_of_states"]

Paths = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class StateReport:
    """A state that was written.

    Attributes:
        state: its file;  bytes: of that.
        accumulator: what it holds: "stack", "dense" or "means".
        condensed: the rank that it was condensed to; None: it was not.
        skipped: clients that were left out because their updates are invalid.
    """

    state: str
    bytes: int
    method: str
    missing: str
    accumulator: str
    condensed: int | None
    clients: tuple[str, ...]
    skipped: tuple[SkippedClient, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)


def state_of_folders(
    folders: Paths,
    state: str | os.PathLike[str],
    *,
    method: str | Method = "flexlora",
    weights: Weights | None = None,
    condense: int | None = None,
    skip_invalid: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> StateReport:
    """A leaf of a tree: folds adapter folders in and saves the round instead of handing out.

    Args:
        state: the file to write; whole, or not at all.
        condense: the rank to condense to before; see :meth:`fastagg.Aggregator.condense`.
        force: replace the file where it exists.

    The others are those of :func:`fastagg.folders.rounds.aggregate_folders`, as is what is raised.
    """
    _check_file(state, force)
    round_ = FolderRound(folders, method=method, weights=weights, skip_invalid=skip_invalid, **options)
    return _saved(round_.fold(progress), state, condense, round_.skipped)


def state_of_states(
    states: Paths,
    state: str | os.PathLike[str],
    *,
    condense: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> StateReport:
    """An inner node: merges saved states into one.

    Args:
        states: files, of one method and one ``missing``.
        state, condense, force: as :func:`state_of_folders`.
        options: those of :class:`fastagg.Aggregator` besides the method and ``missing``.

    Raises:
        InvalidInput: a file that is no state, states that do not fit together, or the file exists.
        MemoryBudgetExceeded: max_memory is not enough.
    """
    _check_file(state, force)
    return _saved(_merged(states, progress, options), state, condense)


def hand_out_states(
    states: Paths,
    out: str | os.PathLike[str],
    *,
    ranks: Sequence[int] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """The root: merges saved states and writes the hand-outs of all their clients.

    Args:
        out, ranks: as :func:`fastagg.folders.rounds.aggregate_folders`.

    The others are those of :func:`state_of_states`, as is what is raised.
    """
    check_free(out, force=force, reading=states)
    result = _merged(states, progress, options).finalize()
    result.save(out, ranks, force=force, progress=progress)
    return result.report


def _merged(states: Paths, progress: Progress | None, options: dict[str, Any]) -> Aggregator:
    """The clients of all states, one state in memory beside them at a time."""
    if not states:
        raise InvalidInput("there is nothing to combine", field="states", expected="at least one file")
    root: Aggregator | None = None
    for done, file in enumerate(states):
        if progress is not None:
            progress(done, len(states), str(file))
        with _named(file):
            state = state_file.read(file)
            method, missing = _kind(state)
            part = Aggregator(method, missing=missing, **options)
            part.load_state_dict(state)
            if root is None:
                root = part
            else:
                root.merge(part)
    assert root is not None
    return root


def _kind(state: dict[str, Any]) -> tuple[str, str]:
    """The method and the ``missing`` that a state was saved with."""
    try:
        header = json.loads(state["fastagg"])
        return str(header["method"]), str(header["missing"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            "not the state of a round",
            field="state",
            expected="what `fastagg aggregate --state` or Aggregator.state_dict() gave",
            got=f"{type(error).__name__}: {error}",
        ) from error


def _saved(
    aggregator: Aggregator,
    state: str | os.PathLike[str],
    condense: int | None,
    skipped: Iterable[SkippedClient] = (),
) -> StateReport:
    if condense is not None:
        aggregator.condense(condense)
    state_file.write(state, aggregator.state_dict())
    return StateReport(
        state=str(state),
        bytes=Path(state).stat().st_size,
        method=aggregator.method.name,
        missing=aggregator.missing,
        accumulator=aggregator.accumulator_kind,
        condensed=condense,
        clients=aggregator.clients,
        skipped=tuple(skipped),
    )


def _check_file(state: str | os.PathLike[str], force: bool) -> None:
    path = Path(state)
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder", field="state", expected="a file")
    if path.exists() and not force:
        raise InvalidInput(f"{path} exists", field="state", cure="Replace it with --force (force=True)")


@contextmanager
def _named(file: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in what its state is refused for."""
    try:
        yield
    except InvalidInput as error:
        if str(file) in error.problem:
            raise
        raise InvalidInput(
            f"{file}: {error.problem}",
            client=error.client,
            module=error.module,
            field=error.field,
            expected=error.expected,
            got=error.got,
            cure=error.cure,
        ) from error
