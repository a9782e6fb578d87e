"""What a client counts for in each module: the first of a method's three choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fastagg import ops
from fastagg.accumulators.source import stack_part
from fastagg.peft_format.layout import Layout
from fastagg.planning.budget import CHUNK_BYTES
from fastagg.planning.plan import ModuleIndex
from fastagg.planning.roster import Float64Array

__all__ = ["Examples", "Norms", "Weighting"]

# A client whose update is zero weighs nothing beside any other, and as much as the others where all
# updates are zero, as they are before the first step of training.
_NO_NORM = 2.0**-500


class Weighting(Protocol):
    """How a client's weight becomes a weight for each of its modules."""

    @property
    def of_numbers(self) -> bool:
        """Whether the factors enter: where not, the weights are known without reading them."""

    def slot_weights(
        self, client: str, weight: float, layout: Layout, flat: torch.Tensor
    ) -> Float64Array:
        """(J,) one weight for each slot of the layout, not normalised."""

    def absent_weight(self, weight: float) -> float:
        """What the client counts for in modules that it lacks, where those count as zero."""


@dataclass(frozen=True)
class Examples:
    """w_kj = w_k, the weight of the update: its number of examples as a rule."""

    of_numbers: bool = False

    def slot_weights(
        self, client: str, weight: float, layout: Layout, flat: torch.Tensor
    ) -> Float64Array:
        """(J,) the client's weight, for each slot."""
        return np.full(len(layout.slots), weight, dtype=np.float64)

    def absent_weight(self, weight: float) -> float:
        """The client's weight."""
        return weight


@dataclass(frozen=True)
class Norms:
    """w_kj = |s_kj B_kj A_kj|_F, the norm of the client's true update of the module.

    The number of examples does not enter, except that a client of weight 0 takes no part. The norms
    come from r x r Gram matrices in float64; no update is formed.
    """

    of_numbers: bool = True

    def slot_weights(
        self, client: str, weight: float, layout: Layout, flat: torch.Tensor
    ) -> Float64Array:
        """(J,) the norms, in the order of the slots."""
        weights = np.zeros(len(layout.slots), dtype=np.float64)
        if weight == 0:
            return weights
        index = ModuleIndex.of({slot.module: (slot.m, slot.n) for slot in layout.slots})
        placed = index.placed(layout)
        dtype = layout.dtype
        by_number = np.empty(len(index), dtype=np.float64)
        for plan in index.plan([layout], [placed.scalings]):
            for lo, hi in plan.runs(CHUNK_BYTES, dtype.itemsize):
                chunk = stack_part(plan, lo, hi, [flat], dtype, [client])
                squares = ops.update_gram(
                    *chunk.factors, chunk.coefficients, plan.part(lo, hi).owners, clients=1
                )
                first = index.number[chunk.modules[0]]
                norms = squares[:, 0, 0].clamp(min=0).sqrt().cpu().numpy()
                by_number[first : first + hi - lo] = np.maximum(norms, _NO_NORM)
        weights[:] = by_number[placed.modules]
        return weights

    def absent_weight(self, weight: float) -> float:
        """0: the update of a module that was not trained has no norm."""
        return 0.0
