"""What a stack holds: adapters, each a client's own or one that stands for several clients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastagg.peft_format.layout import Layout
from fastagg.planning.roster import Float64Array, Member

__all__ = ["Held"]


@dataclass(frozen=True, eq=False)
class Held:
    """One adapter and what it counts for.

    Attributes:
        client: whose it is, for messages.
        layout, flat: where its tensors lie, and the buffer that they lie in.
        slot_weights: (J,) what its update of each module counts for, in the order of the slots.
        whole_weights: (W,) what each of its whole tensors counts for, in their order.
    """

    client: str
    layout: Layout
    flat: torch.Tensor
    slot_weights: Float64Array
    whole_weights: Float64Array

    @classmethod
    def of(cls, member: Member, flat: torch.Tensor) -> Held:
        """A client's own adapter."""
        whole = np.full(len(member.layout.whole), member.weight, dtype=np.float64)
        return cls(member.client, member.layout, flat, member.slot_weights, whole)
