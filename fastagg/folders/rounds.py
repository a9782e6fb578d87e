"""A round from folders to folders: what `fastagg aggregate` does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from fastagg import methods
from fastagg.adapter import Adapter
from fastagg.aggregation import Aggregate
from fastagg.aggregator import Aggregator
from fastagg.distributed import agreeing, gathered
from fastagg.errors import InvalidInput
from fastagg.folders.weights_file import client_weights
from fastagg.handouts.writer import Progress
from fastagg.method import Method
from fastagg.peft_format.adapter_folder import named_path
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout
from fastagg.peft_format.output_folder import check_free
from fastagg.planning.roster import Roster
from fastagg.report import Report, SkippedClient
from fastagg.update import ClientUpdate

__all__ = ["FolderRound", "Progress", "aggregate_folders", "client_folders"]

Weights = Mapping[str, float] | Sequence[float] | str | os.PathLike[str]


def client_folders(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Name each folder's client: the folder's own name (of a link, the link's), or as much of its
    path as tells it apart.

    `a/7` and `a/8` are `7` and `8`; `a/checkpoint` and `b/checkpoint` are `a/checkpoint` and
    `b/checkpoint`.

    Returns:
        client -> folder, in the order given.

    Raises:
        InvalidInput: no folder, or one folder twice.
    """
    if not folders:
        raise InvalidInput(
            "there is nothing to aggregate",
            field="folders",
            expected="at least one adapter folder",
            got="none",
        )
    given: dict[Path, str | os.PathLike[str]] = {}
    for folder in folders:
        place = Path(folder).resolve()
        if place in given:
            raise InvalidInput(
                f"{folder} and {given[place]} are the same folder",
                client=place.name,
                cure="Give each client's folder once",
            )
        given[place] = folder
    paths = {named_path(folder): Path(folder) for folder in given.values()}
    names = _shortest_names(paths)
    return {names[path]: folder for path, folder in paths.items()}


def _shortest_names(paths: Iterable[Path]) -> dict[Path, str]:
    """The shortest ends of distinct paths that tell each from all others."""
    names: dict[Path, str] = {}
    left, length = list(paths), 1
    while left:
        ends: dict[tuple[str, ...], list[Path]] = {}
        for path in left:
            ends.setdefault(path.parts[-length:], []).append(path)
        for end, group in ends.items():
            if len(group) == 1:
                names[group[0]] = "/".join(end)
        left = [path for group in ends.values() if len(group) > 1 for path in group]
        length += 1
    return names


def aggregate_folders(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    method: str | Method = "flexlora",
    weights: Weights | None = None,
    ranks: Sequence[int] | None = None,
    skip_invalid: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Aggregate adapter folders into a folder of adapters, `clients.json` and `report.json`.

    Headers, configurations and the memory needed are checked for all clients first; then each
    folder is mapped, read once and folded in. Memory is the accumulator and a workspace, whatever
    the number of clients.

    Args:
        folders: one a client; :func:`client_folders` names them.
        out: the folder to write; completely, or not at all.
        method: a published method's name.
        weights: by client, in the order of the folders, or a file of them; None: equal weights.
        ranks: hand out these ranks instead of the clients' own.
        skip_invalid: leave clients out whose adapter is invalid or does not fit to those before it;
            the report's `skipped` tells them. An invalid weight is still an error.
        force: replace `out` where it exists.
        progress: called with how much is done, of how much, and the client or module at hand.
        options: those of :class:`fastagg.Aggregator`: max_memory, missing, accumulator, route,
            device, dtype, seed, process_group. With the last, all processes make the same call and share
            the modules; the first writes what is no tensor.

    Raises:
        InvalidInput: anything that cannot be aggregated, or `out` exists.
        MemoryBudgetExceeded: max_memory is not enough; the error says what would be.
    """
    with agreeing(options.get("process_group")):
        check_free(out, force=force, reading=folders)
    round_ = FolderRound(folders, method=method, weights=weights, skip_invalid=skip_invalid, **options)
    result = round_.aggregate(progress)
    result.save(out, ranks, force=force, progress=progress)
    return result.report


class FolderRound:
    """The clients of a round, checked by their headers before any work.

    The arguments are those of :func:`aggregate_folders`.

    Attributes:
        folders: client -> folder of those that take part.
        weights: client -> weight.
        headers: client -> (layout, configuration).
        skipped: those that were left out, and why.

    Raises:
        InvalidInput: as :func:`aggregate_folders`.
    """

    def __init__(
        self,
        folders: Sequence[str | os.PathLike[str]],
        *,
        method: str | Method = "flexlora",
        weights: Weights | None = None,
        skip_invalid: bool = False,
        **options: Any,
    ) -> None:
        self.method = methods.get(method)
        self.options = options
        self.skip_invalid = skip_invalid
        self.skipped: list[SkippedClient] = []
        self.folders: dict[str, Path] = {}
        self.headers: dict[str, tuple[Layout, AdapterConfig]] = {}
        Aggregator(self.method, **options)  # refuses unusable options before reading anything
        self._processes = options.get("process_group")
        with agreeing(self._processes):
            named = client_folders(folders)
            self.weights = client_weights(weights, list(named))
            headers, errors = self._read_headers(named)
        # A folder that one process cannot read is invalid for all.
        errors = reduce(dict.__or__, reversed(gathered(self._processes, errors)))
        roster = self._empty_roster()
        with agreeing(self._processes):
            for client, folder in named.items():
                with self._leaving_out(client, folder):
                    if client in errors:
                        raise errors[client]
                    roster.admit_header(client, *headers[client])
                    self.folders[client] = folder
                    self.headers[client] = headers[client]
            self._check_some_left()

    def roster(self) -> Roster:
        """The clients that take part, as far as their headers tell."""
        return self._empty_roster().with_headers(self._headers())

    def plan(self) -> tuple[str, int]:
        """The accumulator that the round needs, and the bytes that it and the work beside it take.

        Raises:
            MemoryBudgetExceeded: they do not fit into max_memory.
        """
        return Aggregator(self.method, **self.options).plan_for(self._headers())

    def aggregate(self, progress: Progress | None = None) -> Aggregate:
        """Read every client once, and hand the round over.

        Raises:
            InvalidInput, MemoryBudgetExceeded: as :func:`aggregate_folders`.
        """
        result = self.fold(progress).finalize()
        result.skipped = list(self.skipped)
        return result

    def fold(self, progress: Progress | None = None) -> Aggregator:
        """Read every client once and fold it in.

        Raises:
            InvalidInput, MemoryBudgetExceeded: as :func:`aggregate_folders`.
        """
        aggregator = Aggregator(self.method, **self.options)
        aggregator.expect(self._headers())
        for update in self._updates(progress):
            with self._leaving_out(update.client_id, self.folders[update.client_id]):
                aggregator.add(update)
        self._check_some_left()
        return aggregator

    def validate(self, progress: Progress | None = None) -> None:
        """Read every number of every client once.

        Raises:
            InvalidInput: NaN or infinity.
        """
        for update in self._updates(progress):
            with self._leaving_out(update.client_id, self.folders[update.client_id]):
                update.validate()
        self._check_some_left()

    def _read_headers(
        self, named: Mapping[str, Path]
    ) -> tuple[dict[str, tuple[Layout, AdapterConfig]], dict[str, InvalidInput]]:
        """The headers, and what is wrong with other folders; up to the first that ends it all."""
        headers, errors = {}, {}
        for client, folder in named.items():
            try:
                # The mapping is dropped again: a thousand clients would need as many.
                adapter = Adapter.load(folder)
                headers[client] = (adapter.layout, adapter.config)
            except InvalidInput as error:
                errors[client] = error
                if not self.skip_invalid:
                    break
        return headers, errors

    def _headers(self) -> list[tuple[str, Layout, AdapterConfig]]:
        return [(client, layout, config) for client, (layout, config) in self.headers.items()]

    def _updates(self, progress: Progress | None) -> Iterator[ClientUpdate]:
        clients = list(self.folders.items())
        for done, (client, folder) in enumerate(clients):
            if progress is not None:
                progress(done, len(clients), client)
            update = None
            with self._leaving_out(client, folder), agreeing(self._processes):
                update = ClientUpdate.load(folder, self.weights[client], client)
            if update is not None:
                yield update

    @contextmanager
    def _leaving_out(self, client: str, folder: Path) -> Iterator[None]:
        """Leave a client out whose block raises, where invalid clients are to be skipped."""
        try:
            yield
        except InvalidInput as error:
            named = error.for_client(client)
            if not self.skip_invalid:
                raise named from error
            self.folders.pop(client, None)
            self.headers.pop(client, None)
            self.skipped.append(SkippedClient(client, str(folder), str(named)))

    def _empty_roster(self) -> Roster:
        return Roster(equal_ranks=self.method.equal_ranks, method=self.method.name)

    def _check_some_left(self) -> None:
        if not self.folders:
            first = self.skipped[0]
            raise InvalidInput(
                f"none of the {len(self.skipped)} clients is valid",
                field="folders",
                got=f"the first: {first.reason}",
            )
