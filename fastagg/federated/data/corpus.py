"""Text that every CPython ships: the language reference and the library's docstrings.

Sources are parsed, never imported, so nothing that a module does at import happens here. A byte
is a token; byte 0, which no text holds, separates documents.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastagg.errors import FastAggError

SEPARATOR = 0
SHORTEST_DOCSTRING = 40  # characters; below it a docstring is a label more than a text
HELD_OUT_SHARE = 0.2

# Client name -> where its sources lie in the standard library. The first ten are the demo's
# clients; the others step in where a distribution splits a package off or a release drops it.
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


@dataclass(frozen=True)
class ClientText:
    """One client's data.

    train: (bytes,) uint8, documents joined by ``SEPARATOR``.
    held_out: (windows, length) int64, documents that ``train`` holds none of.
    documents: how many docstrings, both parts together.
    """

    name: str
    train: Tensor
    held_out: Tensor
    documents: int

    def examples(self, length: int) -> int:
        """Training examples of ``length`` bytes: the client's aggregation weight."""
        return max(1, len(self.train) // length)


def language_reference() -> Tensor:
    """The topics of ``pydoc_data``, as (bytes,) uint8."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FastAggError(
            "the demo trains on pydoc_data.topics, which this Python was installed without; "
            "install the full standard library (Debian: libpython3-stdlib) and run it again"
        ) from None
    return join(topics[name] for name in sorted(topics))


def client_texts(clients: int, *, length: int, windows: int, seed: int) -> list[ClientText]:
    """The docstrings of ``clients`` packages, each split by document into training and held out.

    Args:
        length: bytes in a held-out window.
        windows: held-out windows per client, the same for all, so that each counts the same.

    Raises:
        FastAggError: the installed standard library has too few sources.
    """
    found: list[ClientText] = []
    for name in PACKAGES:
        text = _client_text(name, docstrings(name), length=length, windows=windows, seed=seed)
        if text is not None:
            found.append(text)
        if len(found) == clients:
            return found
    raise FastAggError(
        f"the demo needs the docstrings of {clients} standard-library packages and found "
        f"{len(found)} ({', '.join(t.name for t in found) or 'none'}) as sources under "
        f"{_library()}; run it on a Python installed with its .py files"
    )


def _client_text(
    name: str, documents: list[str], *, length: int, windows: int, seed: int
) -> ClientText | None:
    """None where the package has too little text for ``windows`` held-out windows."""
    random.Random(f"{seed}/{name}").shuffle(documents)
    total = sum(len(d.encode()) + 1 for d in documents)
    wanted = max(length * windows, int(total * HELD_OUT_SHARE))
    cut = size = 0
    while cut < len(documents) and size < wanted:
        size += len(documents[cut].encode()) + 1
        cut += 1
    train = join(documents[cut:])
    if size < length * windows or len(train) < 2 * length * windows:
        return None
    held_out = join(documents[:cut])[: length * windows].reshape(windows, length)
    return ClientText(name, train, held_out.long(), len(documents))


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


def join(documents: Iterable[str]) -> Tensor:
    """Documents as (bytes,) uint8, each followed by ``SEPARATOR``."""
    data = b"".join(d.encode("utf-8", "replace") + bytes([SEPARATOR]) for d in documents)
    return torch.tensor(list(data), dtype=torch.uint8)
