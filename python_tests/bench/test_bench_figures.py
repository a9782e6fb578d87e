"""The README's figures are its records', and are written by a command alone."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from bench import figures

RECORDS = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*-threads-*.json"))


def test_the_readme_says_what_the_records_say() -> None:
    assert RECORDS
    figures.main([*map(str, RECORDS), "--check"])


def test_a_figure_changed_by_hand_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = figures.README.read_text(encoding="utf-8")
    begin = text.index(figures.BEGIN)
    changed = text[:begin] + text[begin:].replace("| at most 1.5 | ", "| at most 1.5 | 0", 1)
    assert changed != text
    copy = tmp_path / "README.md"
    copy.write_text(changed, encoding="utf-8")
    monkeypatch.setattr(figures, "README", copy)
    with pytest.raises(SystemExit, match="does not say"):
        figures.main([*map(str, RECORDS), "--check"])
    figures.main([*map(str, RECORDS)])
    assert copy.read_text(encoding="utf-8") == text
