"""Whether folders are valid adapters, each alone and all together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastagg.adapter import Adapter
from fastagg.dtypes import dtype_name
from fastagg.errors import InvalidInput
from fastagg.planning.roster import Roster

__all__ = ["Validation", "Verdict", "validate_folders"]


@dataclass(frozen=True)
class Verdict:
    """On one folder: `error` says what is wrong with it alone, `conflict` what sets it apart from
    the folders before it; None where nothing does."""

    client: str
    folder: str
    error: str | None = None
    conflict: str | None = None
    base_model: str | None = None
    modules: int = 0
    ranks: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return self.error is None


@dataclass(frozen=True)
class Validation:
    """On all folders together.

    Attributes:
        verdicts: in the order of the folders.
        together: every folder is valid and all can be aggregated.
        equal_ranks: every module has one rank, which plain averaging of factors (fedit) needs.
    """

    verdicts: tuple[Verdict, ...]
    together: bool
    equal_ranks: bool

    def to_dict(self) -> dict[str, Any]:
        """The verdicts as a JSON-able dictionary."""
        return {
            "together": self.together,
            "equal_ranks": self.equal_ranks,
            "folders": [
                {"valid": verdict.valid, **dataclasses.asdict(verdict)} for verdict in self.verdicts
            ],
        }


def validate_folders(
    folders: Mapping[str, Path] | Sequence[str | os.PathLike[str]],
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Validation:
    """Read every number of every folder once, and compare the folders.

    Args:
        folders: client id -> folder, or folders that :func:`.rounds.client_folders` names.
        progress: called with folders done, folders in all, and the client at hand.
    """
    from fastagg.folders.rounds import client_folders

    named = folders if isinstance(folders, Mapping) else client_folders(folders)
    roster = Roster()
    verdicts = []
    for done, (client, folder) in enumerate(named.items()):
        if progress is not None:
            progress(done, len(named), client)
        verdicts.append(_verdict(client, folder, roster))
    ranks: dict[str, set[int]] = {}
    for member in roster.sorted():
        for slot in member.layout.slots:
            ranks.setdefault(slot.module, set()).add(slot.rank)
    return Validation(
        verdicts=tuple(verdicts),
        together=all(verdict.valid and verdict.conflict is None for verdict in verdicts),
        equal_ranks=all(len(found) == 1 for found in ranks.values()),
    )


def _verdict(client: str, folder: Path, roster: Roster) -> Verdict:
    try:
        adapter = Adapter.load(folder)
        adapter.check_finite(client)
    except InvalidInput as error:
        return Verdict(client, str(folder), error=str(error.for_client(client)))
    slots = adapter.layout.slots
    verdict = Verdict(
        client=client,
        folder=str(folder),
        base_model=adapter.config.base_model,
        modules=len(slots),
        ranks=tuple(sorted({slot.rank for slot in slots})),
        dtypes=tuple(sorted({dtype_name(span.dtype) for slot in slots for span in (slot.a, slot.b)})),
    )
    try:
        roster.admit_header(client, adapter.layout, adapter.config)
    except InvalidInput as error:
        return dataclasses.replace(verdict, conflict=str(error))
    return verdict
