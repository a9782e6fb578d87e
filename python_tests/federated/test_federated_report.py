"""report.html: one file, nothing from elsewhere, and nothing that a name can break."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")

from recorded_folders import round_row, rows_of, whole_run, write_run

from fastagg.errors import InvalidInput
from fastagg.federated.report.html_report import write_report

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """The elements of a page, its text, and its tables' cells; every tag must be closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open:
            self.cells[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page(tmp_path: Path, *folders: Path) -> Page:
    file = tmp_path / "report.html"
    write_report(folders, file)
    return Page(file.read_text(encoding="utf-8"))


def test_a_whole_run(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "flora", rounds=3, failures={2: {"c": "the loss became NaN"}})
    found = page(tmp_path, folder)
    assert len(found.named("img")) == len(found.named("source")) == 5
    for attrs in found.named("img"):
        kind, data = (attrs["src"] or "").split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
        assert attrs["alt"]
    at = found.cells.index("the loss became NaN")
    assert found.cells[at - 2 : at] == ["2", "c"]
    assert "dropout = 0.05" in found.text
    assert "Not recorded" not in found.text


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    found = page(tmp_path, whole_run(tmp_path / "flora", rounds=2))
    for tag, attrs in found.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "srcset", "href"):
            assert (attrs.get(name) or "data:").startswith("data:")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text)
    (policy,) = [tag["content"] for tag in found.named("meta") if tag.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text


def test_names_and_reasons_and_settings_are_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&amp;\''
    rows = rows_of("flora", rounds=1, ranks={evil: 4, "b": 4}, failures={1: {evil: evil}})
    config = f"# </pre>{evil}\n"
    folder = write_run(tmp_path / "<b>run", rows, config=config)
    found = page(tmp_path, folder)
    assert found.named("script") == [] and found.named("b") == []
    assert found.cells.count(evil) == 3  # as failed client, as reason, as client
    assert f"</pre>{evil}" in found.text
    assert found.text.count("<b>run") >= 2


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "flora", [round_row("flora", 0, 5.0)])
    (folder / "config.toml").unlink()
    found = page(tmp_path, folder)
    assert "Not recorded in this run: spectra, similarity, seconds, bytes." in found.text
    assert "there is no config.toml" in found.text
    assert "No client failed." in found.text


def test_losses_that_are_no_numbers(tmp_path: Path) -> None:
    rows = rows_of("flora", rounds=2, ranks={"a": 4})
    rows[-2]["loss"] = float("nan")
    rows[-2]["perplexity"] = float("inf")
    found = page(tmp_path, write_run(tmp_path / "flora", rows))
    assert "nan" in found.cells and "inf" in found.cells


def test_several_runs(tmp_path: Path) -> None:
    for method, floor in (("flora", 1.0), ("zeropad", 2.0)):
        whole_run(tmp_path / "runs" / method, method, rounds=2, floor=floor)
    found = page(tmp_path, tmp_path / "runs")
    assert len(found.named("img")) == 1 + 2 * 4  # the losses of both are one figure
    assert [attrs.get("class") for attrs in found.named("tr")].count("best") == 1
    assert "2 runs" in found.text


def test_no_page_for_no_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
