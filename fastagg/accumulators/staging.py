"""Clients' flat buffers on their way to the device that sums them."""

from __future__ import annotations

import torch

__all__ = ["Staging"]


class Staging:
    """Brings each client to the device in one asynchronous copy, beside the folding of the one before.

    A mapped file is not pinned memory, from which alone the copy engine reads by itself: the host
    copies it into one of two pinned buffers, and a stream of its own takes it on from there. Three
    rules keep the order, for client k and the *compute stream*, that which is current:

    - The fold of k is launched after :meth:`bring`, where the compute stream waits for the copy.
    - Before the host refills a pinned buffer it waits for the copy of k - 2, which read it, and for
      all that was launched on the compute stream up to the fold of k - 2: so the device holds two
      clients at most, k - 1 being folded and k arriving.
    - The buffer on the device belongs to the copy stream's pool of the caching allocator, which may
      give it to the next copy as soon as its last reference is gone, although its fold may still
      be waiting. ``record_stream`` keeps it out of the pool until the compute stream has passed
      that point: no copy overwrites what a fold reads.

    On any other way (to the host, or between devices) a plain copy will do.

    Args:
        device: where the buffers are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._copies: torch.cuda.Stream | None = None
        self._before: torch.cuda.Event | None = None

    @staticmethod
    def bytes_for(device: torch.device, largest: int) -> int:
        """Bytes on the device that bringing clients of up to ``largest`` bytes takes."""
        return 2 * largest if device.type == "cuda" else 0

    def bring(self, flat: torch.Tensor) -> torch.Tensor:
        """The buffer on the device, for work launched from now on; itself where it is there already."""
        if flat.is_cpu and self.device.type == "cuda":
            return self._bring(flat)
        return flat.to(self.device)

    def _bring(self, flat: torch.Tensor) -> torch.Tensor:
        compute = torch.cuda.current_stream(self.device)
        launched = compute.record_event()
        if self._before is not None:
            self._before.synchronize()
        self._before = launched
        source = self._free_room(flat.numel())
        source.copy_(flat)
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            brought = source.to(self.device, non_blocking=True)
        self._copied[self._turn] = self._copies.record_event()
        compute.wait_stream(self._copies)
        brought.record_stream(compute)
        return brought

    def _free_room(self, nbytes: int) -> torch.Tensor:
        """The pinned buffer whose turn it is, once its last copy was made."""
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        if nbytes > self._pinned[self._turn].numel():
            self._pinned[self._turn] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[self._turn][:nbytes]
