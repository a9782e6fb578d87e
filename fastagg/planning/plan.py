"""The plan of a round: which client's factors land in which rows of which bucket.

Modules of one (m, n) form a bucket and are worked on together. The tables are built once a round,
by compiled code, and are all that the ops need beside the clients' flat buffers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fastagg import _host
from fastagg.peft_format.layout import Layout
from fastagg.planning.roster import Float64Array, Member

__all__ = ["ROW_MULTIPLE", "Bucket", "BucketPlan", "ModuleIndex", "WeightTotals", "padded", "stream_of"]

# A multiple of eight rows keeps every row of the transposed slabs 16-byte aligned in bf16.
ROW_MULTIPLE = 8

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


def padded(rows: int) -> int:
    """Rows of a slab that hold so many."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class Bucket:
    """Modules of one shape: dW of each is m x n."""

    m: int
    n: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class _Placed:
    """A layout as the plan sees it, in the order of its slots."""

    modules: Int64Array
    table: Int64Array
    scalings: Float64Array


class ModuleIndex:
    """The modules of a round, numbered in the order of their buckets."""

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        self.buckets = tuple(buckets)
        names = [module for bucket in self.buckets for module in bucket.modules]
        self.number = {module: number for number, module in enumerate(names)}
        lengths = [len(bucket.modules) for bucket in self.buckets]
        self._lengths = np.array(lengths, dtype=np.int64)
        self._bucket = np.repeat(np.arange(len(lengths), dtype=np.int64), self._lengths)
        starts = np.cumsum(self._lengths) - self._lengths
        self._place = np.arange(len(names), dtype=np.int64) - np.repeat(starts, self._lengths)
        self._placed: dict[str, _Placed] = {}

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]]) -> ModuleIndex:
        """The index of modules of these (m, n): a bucket for each shape, modules by name."""
        groups: dict[tuple[int, int], list[str]] = {}
        for module in sorted(shapes):
            groups.setdefault(shapes[module], []).append(module)
        return cls(Bucket(m, n, tuple(groups[m, n])) for m, n in sorted(groups))

    def __len__(self) -> int:
        return len(self.number)

    def where(self, module: str) -> tuple[int, int]:
        """The bucket of a module and its place in it."""
        number = self.number[module]
        return int(self._bucket[number]), int(self._place[number])

    def placed(self, layout: Layout) -> _Placed:
        """The layout's slots in the numbers of this index; -1 for a module that it lacks."""
        found = self._placed.get(layout.digest)
        if found is None:
            numbers = [self.number.get(slot.module, -1) for slot in layout.slots]
            scalings = [slot.scaling for slot in layout.slots]
            found = self._placed[layout.digest] = _Placed(
                np.array(numbers, dtype=np.int64),
                layout.slot_table,
                np.array(scalings, dtype=np.float64),
            )
        return found

    def plan(
        self, layouts: Sequence[Layout], scales: Sequence[Float64Array]
    ) -> list[BucketPlan]:
        """Plans the stack of these layouts, one flat buffer each, in their order.

        Args:
            scales: for each layout (J,) float64, what multiplies the update of each of its slots.

        O(total slots): 100 clients of 224 modules take a few milliseconds.
        """
        placed = [self.placed(layout) for layout in layouts]
        tables = _host.build_plan(
            [layout.table for layout in placed],
            [layout.modules for layout in placed],
            list(scales),
            self._bucket,
            self._place,
            self._lengths,
        )
        return [
            BucketPlan(bucket, *arrays)
            for bucket, arrays in zip(self.buckets, tables, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class BucketPlan:
    """The rows of one bucket's slabs.

    Attributes:
        slots: (S, 9) int64 as the op ``stack`` reads it, by module and then by client.
        scale: (S,) float64, what multiplies the update of each slot.
        first: (L + 1,) int64; the slots first[j] .. first[j + 1] - 1 are those of module j.
        ranks: (L,) int64, the sum of the ranks of each module's slots.
    """

    bucket: Bucket
    slots: Int64Array
    scale: Float64Array
    first: Int64Array
    ranks: Int64Array

    def rows(self, lo: int, hi: int) -> int:
        """Rows of the slabs of modules lo .. hi - 1."""
        return padded(int(self.ranks[lo:hi].max(initial=0)))

    def runs(self, limit: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """Runs of neighbouring modules that have a slot, their slabs within ``limit`` bytes.

        A run has one module at least.
        """
        width = (self.bucket.m + self.bucket.n) * itemsize
        count = len(self.ranks)
        lo = 0
        while lo < count:
            hi, most = lo, 0
            while hi < count and self.ranks[hi] > 0:
                grown = max(most, padded(int(self.ranks[hi])))
                if hi > lo and (hi + 1 - lo) * grown * width > limit:
                    break
                hi, most = hi + 1, grown
            if hi > lo:
                yield lo, hi
            lo = max(hi, lo + 1)

    def part(self, lo: int, hi: int) -> PlanPart:
        """The tables of modules lo .. hi - 1, counted from 0."""
        begin, end = int(self.first[lo]), int(self.first[hi])
        slots = self.slots[begin:end]
        if lo:
            slots = slots.copy()
            slots[:, 0] -= lo
        return PlanPart(slots, self.scale[begin:end], self.ranks[lo:hi], self.rows(lo, hi))


@dataclass(frozen=True, eq=False)
class PlanPart:
    """The tables of some modules of a bucket; see :class:`BucketPlan`."""

    slots: Int64Array
    scale: Float64Array
    ranks: Int64Array
    rows: int

    @cached_property
    def filled(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(L, rows): the rows that some client's factors fill."""
        return np.arange(self.rows)[None, :] < self.ranks[:, None]

    def by_row(self, values: np.ndarray[Any, np.dtype[Any]], empty: float) -> torch.Tensor:
        """Spreads one value per slot over the slot's rows: (L, rows)."""
        spread = np.full(self.filled.shape, empty, dtype=values.dtype)
        spread[self.filled] = np.repeat(values, self.slots[:, 2])
        return torch.from_numpy(spread)

    @cached_property
    def coefficients(self) -> torch.Tensor:
        """(L, rows) float64: the scale of each row's slot, 0 in empty rows."""
        return self.by_row(self.scale, 0.0)

    @cached_property
    def owners(self) -> torch.Tensor:
        """(L, rows) int64: the client of each row, -1 in empty rows."""
        return self.by_row(self.slots[:, 3], -1)

    @property
    def slots_tensor(self) -> torch.Tensor:
        """The slots as the op ``stack`` takes them."""
        return torch.from_numpy(self.slots)


class WeightTotals:
    """D_j, what the weighted sum of a module's updates is divided by.

    The sum of the weights of the members that have the module; with ``missing="zero"`` also of
    those that lack it. Sums are taken in the order of ``add``.
    """

    def __init__(self, missing: str) -> None:
        self.missing = missing
        self.total: dict[str, float] = {}
        self.absent = 0.0

    def add(self, member: Member) -> None:
        """Counts one member in."""
        weights = dict(
            zip((slot.module for slot in member.layout.slots), member.slot_weights, strict=True)
        )
        if self.missing == "zero":
            for module in self.total.keys() - weights.keys():
                self.total[module] += member.absent_weight
        for module, weight in weights.items():
            self.total[module] = self._start(module) + float(weight)
        self.absent += member.absent_weight

    def merged(self, other: WeightTotals) -> WeightTotals:
        """The totals of the members of both."""
        result = WeightTotals(self.missing)
        result.absent = self.absent + other.absent
        for module in sorted(self.total.keys() | other.total.keys()):
            result.total[module] = self._start(module) + other._start(module)
        return result

    def only(self, modules: Collection[str]) -> WeightTotals:
        """The same of some modules alone."""
        result = WeightTotals(self.missing)
        result.absent = self.absent
        result.total = {name: total for name, total in self.total.items() if name in modules}
        return result

    def _start(self, module: str) -> float:
        return self.total.get(module, self.absent if self.missing == "zero" else 0.0)


def stream_of(module: str) -> int:
    """The number of a module's random stream: a hash of its name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(module.encode(), digest_size=8).digest(), "big") >> 1
