"""The README's tables of integrations and trees are their records', written by a command alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from bench import tables


def test_the_readme_says_what_the_records_say() -> None:
    tables.main(["--check"])


def test_another_figure_is_an_error_until_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tables.README.read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    monkeypatch.setattr(tables, "README", copy)
    for name in tables.SECTIONS:
        begin = text.index(f"<!-- {name}:")
        end = text.index(f"<!-- {name}: end")
        section = text[begin:end]
        figure = re.findall(r"\d[\d.]*(?:%|e-\d+)", section)[-1]
        copy.write_text(text[:begin] + section.replace(figure, "7e-77") + text[end:], encoding="utf-8")
        with pytest.raises(SystemExit, match="does not say"):
            tables.main(["--check"])
        tables.main([])
        assert copy.read_text(encoding="utf-8") == text
