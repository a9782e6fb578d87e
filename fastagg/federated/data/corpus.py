"""Text that every CPython ships: the language reference and the library's docstrings.

Sources are parsed, never imported, so nothing that a module does at import happens here. A byte
is a token; byte 0, which no text holds, separates documents.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from fastagg.errors import FastAggError

SEPARATOR = 0
SHORTEST_DOCSTRING = 40  # characters; below it a docstring is a label more than a text

# Client name -> where its sources lie in the standard library. The first of them are the clients of a
# run; the others step in where a distribution splits a package off or a release drops it.
PACKAGES: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "email": ("email",),
    "decimal": ("_pydecimal.py",),
    "logging": ("logging",),
    "importlib": ("importlib",),
    "unittest": ("unittest",),
    "http": ("http",),
    "typing": ("typing.py",),
    "ipaddress": ("ipaddress.py",),
    "statistics": ("statistics.py",),
    "urllib": ("urllib",),
    "difflib": ("difflib.py",),
    "doctest": ("doctest.py",),
    "xml": ("xml",),
    "multiprocessing": ("multiprocessing",),
    "threading": ("threading.py",),
    "configparser": ("configparser.py",),
    "smtplib": ("smtplib.py",),
    "json": ("json",),
    "wsgiref": ("wsgiref",),
}


def language_reference() -> Tensor:
    """The topics of ``pydoc_data``, each followed by ``SEPARATOR``: (bytes,) uint8."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FastAggError(
            "the embedded model is trained on pydoc_data.topics, which this Python was installed "
            "without; install the full standard library (Debian: libpython3-stdlib) and run it again"
        ) from None
    data = b"".join(topics[name].encode() + bytes([SEPARATOR]) for name in sorted(topics))
    return torch.tensor(list(data), dtype=torch.uint8)


def docstrings(name: str) -> list[str]:
    """Every distinct docstring of a package in ``PACKAGES``, by file and line."""
    distinct: dict[str, None] = {}
    for path in _sources(name):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST_DOCSTRING:
                    distinct[text] = None
    return list(distinct)


def _sources(name: str) -> list[Path]:
    for relative in PACKAGES[name]:
        path = _library() / relative
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(p for p in path.rglob("*.py") if not {"test", "tests"} & set(p.parts))
    return []


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))
