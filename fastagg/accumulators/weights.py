"""Weights in running sums: their scale, and the shares that they become."""

from __future__ import annotations

import math

import numpy as np

from fastagg.errors import InvalidInput
from fastagg.planning.plan import WeightTotals
from fastagg.planning.roster import Float64Array

__all__ = ["WeightUnit", "check_sums", "check_totals"]

# How far a later weight may outgrow the unit before the sums are rescaled.
_HEADROOM = 60


class WeightUnit:
    """The power of two that running sums are counted in, near the first weight that is not zero.

    Dividing by it is exact, so it changes no bit of a sum; it keeps float32 from overflowing
    whatever scale the clients' weights have.
    """

    def __init__(self, exponent: int | None = None) -> None:
        self.exponent = exponent

    def admit(self, weight: float) -> float:
        """Makes room for a weight; returns what the sums so far must be multiplied by."""
        return self._reach(math.frexp(weight)[1]) if weight > 0 else 1.0

    def join(self, other: WeightUnit) -> tuple[float, float]:
        """Makes room for the other's sums; what these and those must be multiplied by."""
        if other.exponent is None:
            return 1.0, 1.0
        own = self._reach(other.exponent)
        assert self.exponent is not None
        return own, _power(other.exponent - self.exponent)

    def of(self, weight: float) -> float:
        """A weight in this unit."""
        return math.ldexp(weight, -(self.exponent or 0))

    def of_all(self, weights: Float64Array) -> Float64Array:
        """Weights in this unit."""
        return np.ldexp(weights, -(self.exponent or 0))

    def _reach(self, exponent: int) -> float:
        if self.exponent is None:
            self.exponent = exponent
        if exponent <= self.exponent + _HEADROOM:
            return 1.0
        shift, self.exponent = self.exponent - exponent, exponent
        return _power(shift)


def _power(exponent: int) -> float:
    # Below 2^-1000 a sum is nothing beside its new company.
    return math.ldexp(1.0, max(exponent, -1000))


def check_sums(totals: WeightTotals) -> None:
    """Refuses weights whose sum is no number.

    Raises:
        InvalidInput: it is above the range of float64.
    """
    if any(math.isinf(total) for total in totals.total.values()):
        raise InvalidInput(
            "the sum of the weights is not a number any more",
            field="weight",
            expected="a sum below 1e308",
            cure="Divide all weights by one factor: only their ratios count",
        )


def check_totals(totals: WeightTotals) -> None:
    """Refuses a round whose weights leave a module without an average.

    Raises:
        InvalidInput: no client of weight above zero has the module (or any at all).
    """
    check_sums(totals)
    empty = [module for module, total in totals.total.items() if not total > 0]
    if not empty:
        return
    if len(empty) == len(totals.total):
        raise InvalidInput(
            "all weights are zero",
            field="weight",
            expected="at least one client of weight above 0",
            got=f"{len(empty)} modules without any",
            cure="Give each update its number of examples, or leave the weight out",
        )
    raise InvalidInput(
        "every client that has this module has the weight 0",
        module=min(empty),
        field="weight",
        expected="a client of weight above 0 that trained it",
        got="0 in sum" + (f", as {len(empty) - 1} more modules" if len(empty) > 1 else ""),
        cure="Give such a client a weight, leave those clients out, or use missing='zero'",
    )
