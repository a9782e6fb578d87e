"""What an aggregation would do, from the clients' headers: `fastagg aggregate --dry-run`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastagg.aggregator import Aggregator
from fastagg.folders.rounds import FolderRound
from fastagg.handouts.choices import Settings
from fastagg.handouts.target import Target, targets_for
from fastagg.planning.plan import padded
from fastagg.planning.roster import Roster
from fastagg.report import SkippedClient

__all__ = ["ClientPreview", "FolderPreview", "ModulePreview", "Preview", "preview"]


@dataclass(frozen=True)
class ClientPreview:
    """One client: its weight, the ranks of its modules and the bytes of its adapter."""

    client: str
    folder: str
    weight: float
    ranks: tuple[int, ...]
    modules: int
    bytes: int


@dataclass(frozen=True)
class ModulePreview:
    """One module: the shape of its weight, how many clients have it, R and the route expected."""

    module: str
    shape: tuple[int, ...]
    clients: int
    rank_sum: int
    route: str


@dataclass(frozen=True)
class FolderPreview:
    """One folder that would be written below the output."""

    folder: str
    clients: tuple[str, ...]
    ranks: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Preview:
    """A round before it is run; sizes are in bytes."""

    method: str
    out: str
    accumulator: str
    memory: int
    memory_budget: int | None
    clients: tuple[ClientPreview, ...]
    modules: tuple[ModulePreview, ...]
    folders: tuple[FolderPreview, ...]
    skipped: tuple[SkippedClient, ...]

    def to_dict(self) -> dict[str, Any]:
        """The preview as a JSON-able dictionary."""
        return {"dry_run": True, **dataclasses.asdict(self)}


def preview(
    round_: FolderRound, out: str | os.PathLike[str], ranks: Sequence[int] | None = None
) -> Preview:
    """What :func:`fastagg.folders.rounds.aggregate_folders` would do with a round.

    Raises:
        InvalidInput: ranks that the method does not hand out.
        MemoryBudgetExceeded: the round does not fit into max_memory.
    """
    aggregator = Aggregator(round_.method, **round_.options)
    accumulator, memory = round_.plan()
    roster = round_.roster()
    modules = _modules(roster, aggregator, accumulator)
    targets = targets_for(roster, round_.method.handout, ranks, aggregator.dtype)
    return Preview(
        method=round_.method.name,
        out=os.fspath(out),
        accumulator=accumulator,
        memory=memory,
        memory_budget=aggregator.max_memory,
        clients=tuple(_client(member.client, round_) for member in roster.sorted()),
        modules=tuple(modules),
        folders=tuple(_folder(target) for target in targets),
        skipped=tuple(round_.skipped),
    )


def _modules(roster: Roster, aggregator: Aggregator, accumulator: str) -> list[ModulePreview]:
    ranks_of: dict[str, list[int]] = {}
    for member in roster.sorted():
        for slot in member.layout.slots:
            ranks_of.setdefault(slot.module, []).append(slot.rank)
    found = []
    for module, (slot, _) in sorted(roster.slots.items()):
        ranks = ranks_of[module]
        rank = min(max(ranks), slot.m, slot.n)
        rows = 0 if accumulator == "dense" else padded(sum(ranks))
        settings = Settings(aggregator.route, aggregator.seed, aggregator.device)
        route = aggregator.method.handout.route(slot.m, slot.n, rows, rank, settings)
        found.append(ModulePreview(module, slot.weight_shape, len(ranks), sum(ranks), route))
    return found


def _client(client: str, round_: FolderRound) -> ClientPreview:
    layout, _ = round_.headers[client]
    return ClientPreview(
        client=client,
        folder=str(round_.folders[client]),
        weight=round_.weights[client],
        ranks=tuple(sorted({slot.rank for slot in layout.slots})),
        modules=len(layout.slots),
        bytes=layout.nbytes,
    )


def _folder(target: Target) -> FolderPreview:
    return FolderPreview(
        folder=target.name,
        clients=target.clients,
        ranks=tuple(sorted({slot.rank for slot in target.layout.slots})),
        bytes=target.layout.nbytes,
    )
