"""What was computed, from the device that computed it into the targets' sinks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastagg.handouts.parcel import Parcel
from fastagg.handouts.sink import Sink

__all__ = ["Delivery"]


class _Buffer:
    """Bytes for one call: kept from part to part, since the allocator would pile up holes."""

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def of(self, nbytes: int) -> torch.Tensor:
        """So many bytes, whatever they hold."""
        if nbytes > self._bytes.numel():
            self._bytes = torch.empty(
                nbytes, dtype=torch.uint8, device=self._bytes.device, pin_memory=self._pinned
            )
        return self._bytes[:nbytes]


class Delivery:
    """Carries parcels to the sinks; from a GPU, one is put while the GPU works on what comes after it.

    A GPU's parcel is copied into pinned memory in the order of the current stream, and stays there
    until :meth:`settle`, which the writer calls as soon as it has launched what comes next. One
    buffer on either side is enough: the copy has its place in the stream before whatever fills the
    device's buffer again, and is launched when the sinks have all of the parcel before. A stream of
    its own for the copies would hide next to nothing: files take bytes many times slower than the
    copy engine brings them.

    On a CPU the parcel is put where it is.
    """

    def __init__(self, device: torch.device, sinks: Sequence[Sink]) -> None:
        self._device = device
        self._sinks = sinks
        self._buffer = _Buffer(device)
        self._arrivals = _Buffer(torch.device("cpu"), pinned=device.type == "cuda")
        self._pending: tuple[Parcel, torch.Tensor, torch.cuda.Event] | None = None

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Room for a parcel, on the device."""
        return self._buffer.of(nbytes)

    def send(self, parcel: Parcel) -> None:
        """Takes over the parcel that lies in the buffer."""
        filled = self._buffer.of(parcel.nbytes)
        if filled.is_cpu:
            self._put(parcel, filled)
            return
        self.settle()
        arrived = self._arrivals.of(parcel.nbytes)
        arrived.copy_(filled, non_blocking=True)
        there = torch.cuda.current_stream(self._device).record_event()
        self._pending = parcel, arrived, there

    def settle(self) -> None:
        """Waits for the parcel under way, if there is one, and puts it into its sinks."""
        if self._pending is not None:
            parcel, arrived, there = self._pending
            there.synchronize()
            self._put(parcel, arrived)
            self._pending = None

    def _put(self, parcel: Parcel, data: torch.Tensor) -> None:
        for target, offset, begin, end in parcel.runs:
            self._sinks[target].put(offset, data[begin:end])
