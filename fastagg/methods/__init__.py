"""The published methods, one a file: each defines METHOD and states its paper and its equation.

A file put here is a method: the package is listed, nothing else has to know of it.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastagg.errors import InvalidInput
from fastagg.method import Method

__all__ = ["get", "names"]


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(method: str | Method) -> Method:
    """A method by its name; a Method is returned as it is.

    Raises:
        InvalidInput: no such method.
    """
    if isinstance(method, Method):
        return method
    if method not in names():
        raise InvalidInput(
            "unknown method",
            field="method",
            expected=f"one of {', '.join(names())}",
            got=repr(method),
        )
    found: Method = importlib.import_module(f"{__name__}.{method}").METHOD
    return found
