"""The exact aggregate by its equation, in float64 and without FastAgg: the demo's yardstick."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exact:
    """dW of every module, and its singular values.

    delta: {module: (m, n)} float64, dW = sum_k p_k s_k B_k A_k with p_k = w_k / sum of w.
    """

    delta: Mapping[str, Tensor]
    singular_values: Mapping[str, Tensor]

    @classmethod
    def of(cls, clients: Iterable[tuple[float, Mapping[str, Tensor]]]) -> Exact:
        """From each client's weight w_k and its updates s_k B_k A_k by module, float64."""
        total = 0.0
        delta: dict[str, Tensor] = {}
        for weight, updates in clients:
            total += weight
            for module, update in updates.items():
                delta[module] = delta.get(module, 0.0) + weight * update
        delta = {module: value / total for module, value in delta.items()}
        return cls(delta, {m: torch.linalg.svdvals(value) for m, value in delta.items()})

    @property
    def norm(self) -> float:
        """Frobenius norm over all modules."""
        return math.sqrt(sum(float(value.square().sum()) for value in self.delta.values()))

    def distance(self, received: Mapping[str, Tensor]) -> float:
        """|received - dW| / |dW|, Frobenius norms over all modules."""
        squares = (float((received[m] - value).square().sum()) for m, value in self.delta.items())
        return math.sqrt(sum(squares)) / self.norm

    def optimum(self, rank: int) -> float:
        """The smallest distance that any adapter of this rank has (Eckart and Young)."""
        lost = (float(values[rank:].square().sum()) for values in self.singular_values.values())
        return math.sqrt(sum(lost)) / self.norm
