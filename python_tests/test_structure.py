"""Imports go one way, in the order of the table in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def order() -> dict[str, int]:
    """part of the package -> its row in the table."""
    rows = re.findall(r"^\| (`fastagg/.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    found = {}
    for place, row in enumerate(rows):
        for name in re.findall(r"`(?:fastagg/)?(\w+)(?:/|\.py)`", row):
            found[name] = place
    return found


def imported(tree: ast.AST) -> set[str]:
    """The parts of the package that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastagg"):
            path = (node.module or "").split(".")
            parts |= {path[1]} if len(path) > 1 else {alias.name for alias in node.names}
    return parts


def test_imports_go_one_way() -> None:
    rows = order()
    assert len(rows) > 20
    wrong = []
    for file in (ROOT / "fastagg").rglob("*.py"):
        part = file.relative_to(ROOT / "fastagg").parts[0].removesuffix(".py")
        if part not in rows:
            continue
        for other in imported(ast.parse(file.read_text())):
            if rows.get(other, -1) > rows[part]:
                wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert not wrong
    named = {path.name.removesuffix(".py") for path in (ROOT / "fastagg").glob("[a-z]*")}
    packages = {name for name in named if (ROOT / "fastagg" / name).is_dir()}
    assert packages - {"__pycache__"} <= rows.keys()


def test_what_packages_promise_is_there() -> None:
    """Their names are loaded when they are used: a wrong home would be found by a user."""
    for package in ("fastagg", "fastagg.federated"):
        module = importlib.import_module(package)
        assert all(hasattr(module, name) for name in module.__all__)
