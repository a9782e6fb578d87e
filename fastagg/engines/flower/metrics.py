"""The metrics of a round: what nodes measured, averaged over them, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastagg.engines.exchange import Outcome

__all__ = ["counts", "weighted_means"]

Number = float | list[float]


def counts(outcome: Outcome) -> dict[str, int | float]:
    """What a strategy says of a round among its metrics: who took part, who failed, and the server's own
    seconds."""
    return {
        "fastagg-participants": len(outcome.participants),
        "fastagg-failures": len(outcome.failures),
        "fastagg-seconds": outcome.seconds,
    }


def weighted_means(measured: Iterable[tuple[float, Mapping[str, Any]]]) -> dict[str, Number]:
    """sum_k w_k x_k / sum_k w_k of each metric, over those nodes that have it.

    Args:
        measured: (w_k, name -> number or list of numbers) of each node. What is no number, and lists of
            another length than the first node's, are left out.

    Nodes that all weigh nothing count alike.
    """
    found: dict[str, list[tuple[float, Number]]] = {}
    for weight, metrics in measured:
        for name, value in metrics.items():
            if _is_number(value) or (isinstance(value, list) and all(map(_is_number, value))):
                found.setdefault(name, []).append((weight, value))
    return {name: _mean(values) for name, values in found.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mean(values: Sequence[tuple[float, Number]]) -> Number:
    first = values[0][1]
    if isinstance(first, list):
        rows = [(w, x) for w, x in values if isinstance(x, list) and len(x) == len(first)]
        return [_weighted([(w, row[place]) for w, row in rows]) for place in range(len(first))]
    return _weighted([(w, x) for w, x in values if not isinstance(x, list)])


def _weighted(numbers: list[tuple[float, float]]) -> float:
    if not any(weight for weight, _ in numbers):
        numbers = [(1.0, x) for _, x in numbers]
    return math.fsum(w * x for w, x in numbers) / math.fsum(w for w, _ in numbers)
