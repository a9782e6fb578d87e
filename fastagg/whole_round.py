"""A whole round in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastagg.adapter import Adapter
from fastagg.aggregation import Aggregate
from fastagg.aggregator import Aggregator
from fastagg.errors import InvalidInput
from fastagg.method import Method
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout
from fastagg.update import ClientUpdate

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["aggregate"]

Input = ClientUpdate | str | os.PathLike[str]


def aggregate(
    updates: Iterable[Input],
    method: str | Method = "flexlora",
    *,
    max_memory: int | str | None = None,
    missing: str = "renormalise",
    accumulator: str = "auto",
    route: str = "auto",
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Aggregate:
    """Aggregates the updates of a round.

    Args:
        updates: ClientUpdates, or adapter folders, which count 1 each under their folder's name. A
            list, and any iterable of folders, is checked by its headers before any work: whether
            the clients fit together and into ``max_memory``. An iterator of ClientUpdates is folded
            in as it comes.
        progress: called with clients done, clients in all (0 where that is not known), and the
            client at hand.

    The other arguments are those of :class:`fastagg.Aggregator`. One invalid client fails the whole
    call: to go on without such, validate the folders first, or add them one by one.

    Raises:
        InvalidInput: no update, or one that cannot be aggregated.
        MemoryBudgetExceeded: the round does not fit into max_memory.
    """
    if isinstance(updates, (str, os.PathLike, Adapter, ClientUpdate)):
        raise InvalidInput(
            "one update is not a round",
            field="updates",
            expected="an iterable of ClientUpdates or folders",
            got=type(updates).__name__,
            cure="Pass a list",
        )
    inputs, known = _materialised(updates)
    aggregator = Aggregator(
        method,
        max_memory=max_memory,
        missing=missing,
        accumulator=accumulator,
        route=route,
        device=device,
        dtype=dtype,
        seed=seed,
        process_group=process_group,
    )
    total = 0
    if known is not None:
        aggregator.expect(_header(update) for update in known)
        total = len(known)
    for done, update in enumerate(inputs, start=1):
        aggregator.add(update)
        if progress is not None:
            progress(done, total, _name(update))
    return aggregator.finalize()


def _materialised(updates: Iterable[Input]) -> tuple[Iterable[Input], Sequence[Input] | None]:
    """The updates, and all of them as a sequence where they may be looked at twice."""
    if isinstance(updates, Sequence):
        return updates, updates
    iterator = iter(updates)
    first = next(iterator, None)
    if first is None:
        return (), ()
    if isinstance(first, ClientUpdate):
        return chain([first], iterator), None
    known = [first, *iterator]
    return known, known


def _name(update: Input) -> str:
    return update.client_id if isinstance(update, ClientUpdate) else Path(update).name


def _header(update: Input) -> tuple[str, Layout, AdapterConfig]:
    if isinstance(update, ClientUpdate):
        return update.client_id, update.adapter.layout, update.adapter.config
    # The mapping is dropped again: thousands of clients would need as many open files.
    adapter = Adapter.load(update)
    return adapter.name or _name(update), adapter.layout, adapter.config
