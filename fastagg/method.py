"""A published method is three choices: weights, accumulator and hand-out."""

from __future__ import annotations

from dataclasses import dataclass

from fastagg.handout import Handout
from fastagg.weighting import Weighting

__all__ = ["Method"]


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        name: what users call it.
        paper: title and venue;  arxiv: its number.
        equation: what the server computes, in one line.
        weights: what each client counts for in each module.
        accumulators: the kinds that can hold its state: "stack" and "dense", or "means".
        handout: what the clients get.
        equal_ranks: all clients must have the same rank in a module.
    """

    name: str
    paper: str
    arxiv: str
    equation: str
    weights: Weighting
    accumulators: tuple[str, ...]
    handout: Handout
    equal_ranks: bool = False
