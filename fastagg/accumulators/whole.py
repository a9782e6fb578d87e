"""Weighted averages of whole tensors: modules_to_save, and what PEFT saves beside the factors.

A client that lacks such a tensor has left the base model's own in place, which the server does not
know: the weights are renormalised over the clients that have it, whatever ``missing`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fastagg.accumulators.held import Held
from fastagg.accumulators.weights import WeightUnit
from fastagg.errors import InvalidInput
from fastagg.peft_format.layout import TensorSpan

__all__ = ["HeldWhole", "SummedWhole", "WholeSums", "check_total", "sum_dtype"]

# Elements averaged at a time; also the largest tensor whose running sum is kept in float64.
BLOCK = 1 << 20


def elements(flat: torch.Tensor, span: TensorSpan, begin: int, end: int) -> torch.Tensor:
    """Elements begin .. end - 1 of a flattened tensor of a flat buffer."""
    size = span.dtype.itemsize
    return flat[span.offset + begin * size : span.offset + end * size].view(span.dtype)


class HeldWhole:
    """Averages of tensors of which every client's own is held, or an average of some: in their order."""

    def __init__(self, held: Sequence[Held], device: torch.device) -> None:
        self._holders: dict[str, list[tuple[float, torch.Tensor, TensorSpan]]] = {}
        self._device = device
        for each in held:
            for span, weight in zip(each.layout.whole, each.whole_weights.tolist(), strict=True):
                self._holders.setdefault(span.key, []).append((weight, each.flat, span))

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sorted(self._holders))

    def total(self, key: str) -> float:
        """The sum of the weights of those that have a tensor."""
        return sum(weight for weight, _, _ in self._holders[key])

    def check(self) -> None:
        """Refuses weights that leave a tensor without an average.

        Raises:
            InvalidInput: a tensor whose clients all have the weight 0.
        """
        for key in self._holders:
            check_total(key, self.total(key))

    def blocks(self, key: str) -> Iterator[tuple[int, int, torch.Tensor]]:
        holders = self._holders[key]
        weights = np.array([weight for weight, _, _ in holders])
        largest = weights.max() or 1.0
        shares = (weights / largest) / ((weights / largest).sum() or 1.0)
        count = holders[0][2].count
        for begin in range(0, count, BLOCK):
            end = min(begin + BLOCK, count)
            total = torch.zeros(end - begin, dtype=torch.float64, device=self._device)
            for (_, flat, span), share in zip(holders, shares, strict=True):
                values = elements(flat, span, begin, end)
                total.add_(values.double(), alpha=float(share))
            yield begin, end, total.cpu()


class WholeSums:
    """Running weighted sums; float64 for small tensors, float32 for those that would cost memory.

    Args:
        device: where they are kept, and where the clients' buffers are when they are added.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}
        self.totals: dict[str, float] = {}
        self.unit = WeightUnit()

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(value.nbytes for value in self.sums.values())

    @staticmethod
    def bytes_for(spans: Sequence[TensorSpan]) -> int:
        """Bytes that the sums of these tensors take."""
        return sum(span.count * sum_dtype(span.count).itemsize for span in spans)

    def make_room(self, span: TensorSpan) -> None:
        """Allocates the sum of a tensor that has none yet."""
        if span.key not in self.sums:
            dtype = sum_dtype(span.count)
            self.sums[span.key] = torch.zeros(span.count, dtype=dtype, device=self.device)
            self.totals[span.key] = 0.0

    def add(self, held: Held) -> None:
        """Adds one client's tensors, or the averages of some clients."""
        self._rescale(self.unit.admit(float(held.whole_weights.max(initial=0.0))))
        for span, weight in zip(held.layout.whole, held.whole_weights.tolist(), strict=True):
            self.make_room(span)
            sums = self.sums[span.key]
            for begin in range(0, span.count, BLOCK):
                end = min(begin + BLOCK, span.count)
                values = elements(held.flat, span, begin, end)
                sums[begin:end].add_(values.to(sums.dtype), alpha=self.unit.of(weight))
            self.totals[span.key] += weight

    def merge(self, other: WholeSums) -> None:
        """Adds the sums of other clients."""
        own, ratio = self.unit.join(other.unit)
        self._rescale(own)
        for key, theirs in other.sums.items():
            sums = theirs.to(self.device)
            if key in self.sums:
                self.sums[key].add_(sums, alpha=ratio)
            else:
                self.sums[key] = sums * ratio
            self.totals[key] = self.totals.get(key, 0.0) + other.totals[key]

    def finish(self) -> SummedWhole:
        """The averages.

        Raises:
            InvalidInput: a tensor whose clients all have the weight 0.
        """
        for key, total in self.totals.items():
            check_total(key, total)
        return SummedWhole(self)

    def _rescale(self, factor: float) -> None:
        if factor != 1.0:
            for sums in self.sums.values():
                sums.mul_(factor)


class SummedWhole:
    """Averages out of running sums."""

    def __init__(self, sums: WholeSums) -> None:
        self._sums = sums

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self._sums.nbytes

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sorted(self._sums.sums))

    def total(self, key: str) -> float:
        """The sum of the weights of those that have a tensor."""
        return self._sums.totals[key]

    def blocks(self, key: str) -> Iterator[tuple[int, int, torch.Tensor]]:
        sums = self._sums.sums[key]
        # A sum of tensors of weight 0 is 0.
        total = self._sums.unit.of(self._sums.totals[key]) or 1.0
        for begin in range(0, sums.numel(), BLOCK):
            end = min(begin + BLOCK, sums.numel())
            yield begin, end, (sums[begin:end].double() / total).cpu()


def sum_dtype(count: int) -> torch.dtype:
    """Of the sum, or the average, of tensors of so many elements."""
    return torch.float64 if count <= BLOCK else torch.float32


def check_total(key: str, total: float) -> None:
    """Refuses a whole tensor that the weights leave without an average.

    Raises:
        InvalidInput: no client of weight above zero has it.
    """
    if not total > 0:
        raise InvalidInput(
            "every client that has this tensor has the weight 0",
            field=key,
            expected="a client of weight above 0",
            got="0 in sum",
            cure="Give such a client a weight, or leave those clients out",
        )
