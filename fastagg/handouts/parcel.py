"""The factors of some modules for all targets, packed into one buffer between op and sinks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastagg.dtypes import DTYPE_CODES
from fastagg.planning.plan import Bucket, PlanPart

__all__ = ["Parcel", "split_by_target"]

_ITEMSIZES = np.array(
    [dtype.itemsize for dtype, _ in sorted(DTYPE_CODES.items(), key=lambda item: item[1])]
)
_LARGEST = np.array(
    [torch.finfo(dtype).max for dtype, _ in sorted(DTYPE_CODES.items(), key=lambda item: item[1])]
)
_ALIGNMENT = 8


class Parcel:
    """What goes where: the factors lie in the buffer in the order that they have in the targets.

    Attributes:
        nbytes: length of the buffer.
        slots, scalings: as the op ``redistribute_`` takes them, with the buffer as its only flat.
        spans: as the op ``scan`` takes them: all A, then all B, in the order of the slots.
        safe_below: no factor overflows if the entries of U diag(S) and of Vt are below this.
        runs: (target, offset in the target's flat buffer, begin, end in the buffer) to be copied.
    """

    def __init__(self, wanted: PlanPart, bucket: Bucket) -> None:
        module, _, rank, target, a_offset, a_dtype, _, b_offset, b_dtype = wanted.slots.T
        self._target = np.concatenate([target, target])
        self._offset = np.concatenate([a_offset, b_offset])
        dtype = np.concatenate([a_dtype, b_dtype])
        count = np.concatenate([rank * bucket.n, rank * bucket.m])
        size = count * _ITEMSIZES[dtype]
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        order = np.lexsort((self._offset, self._target))
        begin = np.empty_like(room)
        begin[order] = np.cumsum(room[order]) - room[order]
        half = len(rank)
        zeros = np.zeros_like(rank)
        table = [module, rank, zeros, begin[:half], a_dtype, begin[half:], b_dtype]
        self.nbytes = int(room.sum())
        self.slots = torch.from_numpy(np.stack(table, axis=1))
        self.scalings = torch.from_numpy(wanted.scale)
        self.spans = torch.from_numpy(np.stack([begin, count, dtype], axis=1))
        scale = np.minimum(np.abs(wanted.scale), 1.0)
        dtypes_max = np.minimum(_LARGEST[a_dtype], _LARGEST[b_dtype])
        self.safe_below = float((0.5 * dtypes_max * scale).min())
        self.runs = list(self._runs(order, begin, size, room))

    def whose(self, span: int) -> tuple[int, int]:
        """The target of a row of ``spans``, and its offset in that target's flat buffer."""
        return int(self._target[span]), int(self._offset[span])

    def _runs(
        self,
        order: np.ndarray[tuple[int], np.dtype[np.int64]],
        begin: np.ndarray[tuple[int], np.dtype[np.int64]],
        size: np.ndarray[tuple[int], np.dtype[np.int64]],
        room: np.ndarray[tuple[int], np.dtype[np.int64]],
    ) -> Iterator[tuple[int, int, int, int]]:
        """Neighbours in both the buffer and the target are copied together."""
        target, offset = self._target[order], self._offset[order]
        start, length = begin[order], size[order]
        apart = (target[1:] != target[:-1]) | (offset[1:] != offset[:-1] + length[:-1])
        apart |= room[order][:-1] != length[:-1]
        firsts = np.concatenate([[0], np.flatnonzero(apart) + 1])
        lasts = np.concatenate([firsts[1:] - 1, [len(order) - 1]])
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            end = int(start[last] + length[last])
            yield int(target[first]), int(offset[first]), int(start[first]), end


def split_by_target(wanted: PlanPart, bucket: Bucket, room: int) -> Iterator[PlanPart]:
    """Splits what the targets want into groups of targets whose factors take ``room`` bytes.

    A group has one target at least: the memory does not grow with the number of targets.
    """
    _, _, rank, target, _, a_dtype, _, _, b_dtype = wanted.slots.T
    sizes = rank * (bucket.n * _ITEMSIZES[a_dtype] + bucket.m * _ITEMSIZES[b_dtype])
    sizes += 2 * _ALIGNMENT
    by_target = np.bincount(target, weights=sizes)
    group, filled, groups = 0, 0.0, np.zeros(len(by_target), dtype=np.int64)
    for number, size in enumerate(by_target.tolist()):
        if filled and filled + size > room:
            group, filled = group + 1, 0.0
        groups[number] = group
        filled += size
    for number in range(group + 1):
        chosen = groups[target] == number
        if chosen.any():
            yield PlanPart(wanted.slots[chosen], wanted.scale[chosen], wanted.ranks, wanted.rows)
