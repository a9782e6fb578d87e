"""Frameworks of the versions that work, or an error that names those."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from importlib import metadata

from fastagg.errors import FastAggError

__all__ = ["require"]


def require(package: str, names: Iterable[str], *, since: str, below: str, extra: str) -> None:
    """Checks that a framework is there, of a version that works, and has what is used of it.

    Args:
        package: its name on the package index.
        names: what is used: "module:attribute", or "module".
        since: the first version that works;  below: the first that may not.
        extra: FastAgg's extra that installs it.

    Raises:
        FastAggError: it is missing, of another version, or lacks a name; the error names the versions
            that work and the command that installs one.
    """
    works = f"FastAgg works with {package} >= {since}, < {below}: pip install 'fastagg[{extra}]'"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise FastAggError(f"{package} is not installed. {works}") from None
    if not _release(since) <= _release(version) < _release(below):
        raise FastAggError(f"{package} {version} is installed, which was never tried. {works}")
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            found = importlib.import_module(module)
            if attribute:
                getattr(found, attribute)
        except (ImportError, AttributeError) as error:
            raise FastAggError(
                f"{package} {version} has no {name.replace(':', '.')} ({error}). {works}"
            ) from error


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with; what follows (rc1, .dev, +cpu) is not looked at."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
