"""Seconds as people write and read them."""

from __future__ import annotations

__all__ = ["format_seconds"]

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def format_seconds(seconds: float) -> str:
    """A duration for people, to three digits: "4.81 ms"."""
    for size, unit in _UNITS:
        # What rounds to 1000 of a unit is 1 of the next.
        if abs(seconds) >= size * 0.9995 or unit == "ns":
            amount = seconds / size
            return f"{amount:.0f} {unit}" if abs(amount) >= 999.5 else f"{amount:.3g} {unit}"
    raise AssertionError("the last unit takes all that is left")
