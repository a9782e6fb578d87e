"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

from fastagg.errors import InvalidInput

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "kib": 1 << 10,
    "m": 10**6, "mb": 10**6, "mib": 1 << 20,
    "g": 10**9, "gb": 10**9, "gib": 1 << 30,
    "t": 10**12, "tb": 10**12, "tib": 1 << 40,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: int | str | None) -> int | None:
    """Reads a budget: an int of bytes, or a text such as "8GiB", "500MB", "1.5g".

    Raises:
        InvalidInput: not such a value, or not above zero.
    """
    if value is None:
        return None
    found: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str):
        match = _AMOUNT.fullmatch(value)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match and unit:
            found = int(float(match[1]) * unit)
    if found is None or found <= 0:
        raise InvalidInput(
            "not an amount of memory",
            field="max_memory",
            expected="a positive number of bytes, or a text such as '8GiB' or '500MB'",
            got=repr(value),
        )
    return found


def format_bytes(count: float) -> str:
    """A number of bytes for people: "1.5 GiB"."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
