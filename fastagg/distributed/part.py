"""The part of an adapter that one rank has."""

from __future__ import annotations

from collections.abc import Collection

import torch

from fastagg.peft_format.layout import Layout

__all__ = ["Part"]


class Part:
    """Some tensors of a layout, packed into a buffer of their own.

    Attributes:
        layout: of that buffer.
        places: (J',) where its slots are among those of the whole layout.
    """

    def __init__(self, whole: Layout, modules: Collection[str], keys: Collection[str]) -> None:
        self.layout = whole.part(modules, keys)
        self.places = [
            place for place, slot in enumerate(whole.slots) if slot.module in self.layout.by_module
        ]
        source = {span.key: span.offset for span in whole.tensors}
        self._copies = [(source[span.key], span.offset, span.nbytes) for span in self.layout.tensors]

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Copies the tensors out of a whole buffer (1-D uint8); the other bytes are not looked at."""
        taken = torch.empty(self.layout.nbytes, dtype=torch.uint8, device=flat.device)
        for begin, place, nbytes in self._copies:
            taken[place : place + nbytes].copy_(flat[begin : begin + nbytes])
        return taken
