"""What of a round this process does: all of it, or the modules that are its share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from fastagg.accumulators.weights import check_totals
from fastagg.accumulators.whole import check_total
from fastagg.adapter import Adapter
from fastagg.distributed.assignment import Assignment, Item, module_cost, tensor_cost
from fastagg.distributed.part import Part
from fastagg.errors import InvalidInput
from fastagg.peft_format.layout import Layout
from fastagg.planning.plan import WeightTotals
from fastagg.planning.roster import Float64Array, Member, Roster
from fastagg.update import ClientUpdate

if TYPE_CHECKING:
    from fastagg.distributed.group import Group

__all__ = ["Share", "ShareOfModules"]

T = TypeVar("T")


class Share:
    """All of a round, in one process: nothing to agree on, nothing to exchange.

    What one process does is written down once, in terms of this; :class:`ShareOfModules` is what
    makes it one of several.

    Attributes:
        whole: the round's roster.
        own: the roster of what this process has of each client.
        first: this process writes what is written once.
    """

    def __init__(self, whole: Roster) -> None:
        self.whole = whole
        self.own = whole
        self.first = True

    def emptied(self, whole: Roster) -> Share:
        """The same process's share of another roster, which is empty."""
        return Share(whole)

    @contextmanager
    def growing(self) -> Iterator[list[object]]:
        """:meth:`agreeing`, and what :meth:`grow` decides in the block is forgotten where it fails."""
        yield []

    def grow(self, layouts: Iterable[Layout]) -> None:
        """Decides who has the modules of these layouts that are new to the round."""

    def admit(self, member: Member) -> None:
        """Enters a member of the whole roster into the own one."""

    def part_of(self, layout: Layout) -> Layout:
        """What this process has of a client of this layout."""
        return layout

    def update(self, update: ClientUpdate) -> ClientUpdate:
        """What this process has of an update: only those bytes are read."""
        return update

    def member(self, member: Member) -> Member:
        """What this process has of a member."""
        return member

    def weights(self, layout: Layout, own: Float64Array) -> Float64Array:
        """(J,) the weights of all slots of a layout, out of those of the own part's slots."""
        return own

    @contextmanager
    def agreeing(self) -> Iterator[list[object]]:
        """A block that all processes pass or none; what is put into the list must be alike."""
        yield []

    def most(self, values: Sequence[int]) -> list[int]:
        """The largest of each number among the processes."""
        return list(values)

    def gather(self, value: T) -> list[T]:
        """What each process has."""
        return [value]

    def complete(self, tensor: torch.Tensor) -> None:
        """Fills in what the others know of a tensor that is zero but where this process knows it."""

    def has(self, module: str) -> bool:
        """Whether a module is this process's."""
        return True

    def check_weights(self, missing: str) -> None:
        """Refuses weights that leave a part of the round without an average, on all processes alike.

        One process finds out when it divides.
        """

    def check_alone(self, what: str) -> None:
        """Refuses what only a process with all modules can do.

        Raises:
            InvalidInput: it has not.
        """


class ShareOfModules(Share):
    """Some modules and whole tensors of a round, of all its clients.

    Every rank sees every client's header; of the numbers it copies those of its own modules out of
    the mapped files. What is computed for a module depends neither on the others nor on where they
    are, so the bits are those of one process.

    Args:
        group: of the ranks; all make the same calls in the same order.
        whole: the roster; its modules are shared out together, the costliest first.
    """

    def __init__(self, group: Group, whole: Roster) -> None:
        super().__init__(whole)
        self.group = group
        self.first = group.rank == 0
        self.assignment = Assignment(group.size)
        self.own = Roster(equal_ranks=whole.equal_ranks, method=whole.method)
        self._parts: dict[tuple[str, int], Part] = {}
        costs: dict[Item, float] = {
            ("module", module): module_cost(size.m, size.n, size.rank_sum, size.width)
            for module, size in whole.sizes.items()
        }
        for member in whole.members.values():
            for span in member.layout.whole:
                item = ("tensor", span.key)
                costs[item] = costs.get(item, 0.0) + tensor_cost(span.nbytes, 1)
        self.assignment.assign(costs)
        for member in whole.members.values():
            self.admit(member)

    def emptied(self, whole: Roster) -> ShareOfModules:
        share = ShareOfModules(self.group, whole)
        share.assignment = self.assignment
        return share

    @contextmanager
    def growing(self) -> Iterator[list[object]]:
        before = self.assignment.copy()
        try:
            with self.group.agreeing() as same:
                yield same
        except BaseException:
            self.assignment = before
            self._parts.clear()
            raise

    def grow(self, layouts: Iterable[Layout]) -> None:
        costs: dict[Item, float] = {}
        for layout in layouts:
            for slot in layout.slots:
                cost = module_cost(slot.m, slot.n, slot.rank, slot.rank)
                costs["module", slot.module] = costs.get(("module", slot.module), 0.0) + cost
            for span in layout.whole:
                costs["tensor", span.key] = tensor_cost(span.nbytes, 1)
        self.assignment.assign(costs)

    def admit(self, member: Member) -> None:
        self.own.admit(self.member(member))

    def part(self, layout: Layout, rank: int) -> Part:
        """What a rank has of a client of this layout."""
        found = self._parts.get((layout.digest, rank))
        if found is None:
            found = self._parts[layout.digest, rank] = self._new_part(layout, rank)
        return found

    def part_of(self, layout: Layout) -> Layout:
        return self.part(layout, self.group.rank).layout

    def update(self, update: ClientUpdate) -> ClientUpdate:
        adapter, part = update.adapter, self.part(update.adapter.layout, self.group.rank)
        numbers = part.of(adapter.flat)
        adapter.check_unchanged(update.client_id)
        own = Adapter.from_flat(numbers, part.layout, adapter.config, name=adapter.name)
        return ClientUpdate(own, update.weight, update.client_id)

    def member(self, member: Member) -> Member:
        part = self.part(member.layout, self.group.rank)
        # A header without its numbers has no weights yet.
        weights = member.slot_weights[part.places] if len(member.slot_weights) else member.slot_weights
        return replace(member, layout=part.layout, slot_weights=weights)

    def weights(self, layout: Layout, own: Float64Array) -> Float64Array:
        every: Float64Array = np.zeros(len(layout.slots), dtype=np.float64)
        every[self.part(layout, self.group.rank).places] = own
        self.group.add_up(torch.from_numpy(every))  # zeros but where a rank knows: exact
        return every

    @contextmanager
    def agreeing(self) -> Iterator[list[object]]:
        with self.group.agreeing() as same:
            yield same

    def most(self, values: Sequence[int]) -> list[int]:
        return self.group.most(values)

    def gather(self, value: T) -> list[T]:
        return self.group.gather(value)

    def complete(self, tensor: torch.Tensor) -> None:
        self.group.complete(tensor)

    def has(self, module: str) -> bool:
        return self.assignment.owner["module", module] == self.group.rank

    def check_weights(self, missing: str) -> None:
        totals = WeightTotals(missing)
        tensors: dict[str, float] = {}
        for member in self.whole.sorted():
            totals.add(member)
            for span in member.layout.whole:
                tensors[span.key] = tensors.get(span.key, 0.0) + member.weight
        check_totals(totals)
        for key, total in tensors.items():
            check_total(key, total)

    def check_alone(self, what: str) -> None:
        raise InvalidInput(
            f"{what} needs all modules in one process, and this one has a share of them",
            field="process_group",
            got=f"rank {self.group.rank} of {self.group.size}",
            cure="Write the round with .save(folder) and go on from the folder, or aggregate without "
            "a process group",
        )

    def _new_part(self, layout: Layout, rank: int) -> Part:
        names: dict[str, list[str]] = {"module": [], "tensor": []}
        for kind, name in [
            *(("module", slot.module) for slot in layout.slots),
            *(("tensor", span.key) for span in layout.whole),
        ]:
            if self.assignment.owner[kind, name] == rank:
                names[kind].append(name)
        return Part(layout, frozenset(names["module"]), frozenset(names["tensor"]))
