"""A record comes back as it was written; what is not one is refused by name of the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

from pydantic import ValidationError

from fastagg.bench.record import (
    SCHEMA,
    LeftOut,
    Machine,
    Record,
    Row,
    Settings,
    read_record,
    write_record,
)
from fastagg.errors import InvalidInput

ROW: dict[str, Any] = {
    "case": "square-256",
    "op": "stack",
    "contender": "fastagg stack_",
    "kind": "fastagg",
    "seconds": 1 / 3,
    "low": 0.1,
    "high": 0.7,
    "turns": 20,
    "noise": 0.01,
    "modules": 44,
    "timed_modules": 2,
    "clients": 10,
    "rows": 160,
    "bytes_in": 1e9 + 1,
    "bytes": 2.5e9,
    "flops": 0.0,
    "wide_flops": 1e12,
    "share_of_limit": None,
    "peak_bytes": 4096,
    "error": 1.2345678901234567e-8,
    "orthogonality": None,
    "ratios": {"torch.cat, »then« multiply": 3.1, "memory copy": 0.2},
}


def machine() -> Machine:
    return Machine(
        date="2026-01-02",
        system="Linux x86_64",
        cpu="a CPU\u2122",
        capability="AVX512",
        cores=2,
        memory_bytes=None,
        python="3.11.7",
        torch="2.13.0",
        fastagg="0.1.0",
        commit="0123456789ab+",
    )


def record(complete: bool = True) -> Record:
    settings = Settings(
        device="cpu", threads=2, effort="quick", dtype="bfloat16", factors="signal", seed=7
    )
    return Record(
        complete=complete,
        machine=machine(),
        settings=settings,
        rows=[
            Row(**ROW),
            Row(**{**ROW, "op": "svd", "noise": None, "timed_modules": 44}),
            Row(**{**ROW, "contender": "memory copy", "kind": "limit", "error": None, "ratios": {}}),
        ],
        left_out=[
            LeftOut(case="square-256", op="svd", contender="PEFT", reason="No module named 'peft'")
        ],
    )


@pytest.mark.parametrize("complete", [True, False])
def test_a_record_comes_back_equal(complete: bool, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "record.json"
    write_record(path, record(complete))
    found = read_record(path)
    assert found == record(complete)
    assert found.complete == complete
    assert found.rows[0].error == 1.2345678901234567e-8
    write_record(path, found)
    assert read_record(path) == found


def test_what_a_reader_asks_of_it() -> None:
    found = record()
    assert found.tables() == [("square-256", "stack"), ("square-256", "svd")]
    assert [row.contender for row in found.of("square-256", "stack")] == [
        "fastagg stack_",
        "memory copy",
    ]
    assert [row.scaled for row in found.rows] == [True, False, True]
    assert found.rows[0].key == ("square-256", "stack", "fastagg stack_")


def written(tmp_path: Path, change: Callable[[Any], Any]) -> Path:
    path = tmp_path / "record.json"
    write_record(path, record())
    document = json.loads(path.read_text())
    path.write_text(json.dumps(change(document)))
    return path


def put(*keys: Any, value: Any) -> Callable[[Any], Any]:
    """A document with another value there."""

    def change(document: Any) -> Any:
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return document

    return change


def without(*keys: Any) -> Callable[[Any], Any]:
    def change(document: Any) -> Any:
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return document

    return change


BROKEN = {
    "another schema": (put("schema_version", value=SCHEMA + 1), "schema_version"),
    "the schema before": (put("schema_version", value=1), "schema_version"),
    "a schema in words": (put("schema_version", value=str(SCHEMA)), "schema_version"),
    "no schema": (without("schema_version"), "schema_version"),
    "another program's JSON": (lambda document: {"results": []}, "schema_version"),
    "a list": (lambda document: [document], "schema_version"),
    "a number": (lambda document: 2, "schema_version"),
    "null": (lambda document: None, "schema_version"),
    "an extra field": (put("comment", value="x"), "comment"),
    "an extra field of a row": (put("rows", 1, "speed", value=3), "rows.1.speed"),
    "an extra field of the machine": (put("machine", "owner", value="x"), "machine.owner"),
    "no rows": (without("rows"), "rows"),
    "no settings": (without("settings"), "settings"),
    "a row without its error": (without("rows", 0, "error"), "rows.0.error"),
    "a row without its noise": (without("rows", 2, "noise"), "rows.2.noise"),
    "a machine without a CPU": (without("machine", "cpu"), "machine.cpu"),
    "not whether it is complete": (without("complete"), "complete"),
    "a kind that is none": (put("rows", 0, "kind", value="theirs"), "rows.0.kind"),
    "no time at all": (put("rows", 0, "seconds", value=0), "rows.0.seconds"),
    "less than no time": (put("rows", 0, "seconds", value=-1), "rows.0.seconds"),
    "words for a number": (put("rows", 0, "seconds", value="fast"), "rows.0.seconds"),
    "an effort that is none": (put("settings", "effort", value="some"), "settings.effort"),
    "a row that is none": (put("rows", 0, value="fast"), "rows.0"),
    "a reason that is none": (put("left_out", 0, "reason", value=None), "left_out.0.reason"),
}


@pytest.mark.parametrize(("change", "field"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_not_a_record_is_refused_by_its_field(
    change: Callable[[Any], Any], field: str, tmp_path: Path
) -> None:
    path = written(tmp_path, change)
    with pytest.raises(InvalidInput) as caught:
        read_record(path)
    assert caught.value.field == field
    assert str(path) in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, record())
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InvalidInput, match="is not a record"):
        read_record(path)


@pytest.mark.parametrize("content", [b"\x80\x02binary", b"case,op,seconds\n1,2,3\n", b"{'a': 1}"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="fastagg bench"):
        read_record(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "none.json")


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """What cannot be put into place leaves what was there, and nothing of itself."""
    path = tmp_path / "record.json"
    write_record(path, record(complete=False))
    before = path.read_bytes()
    place = tmp_path / "taken"
    (place / "by a folder").mkdir(parents=True)
    with pytest.raises(OSError):
        write_record(place, record())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.json", "taken"]
    assert path.read_bytes() == before
    # Characters that no UTF-8 file can hold fail half-way.
    spoilt = record().model_copy(update={"machine": machine().model_copy(update={"cpu": "\ud800"})})
    with pytest.raises(ValueError):
        write_record(path, spoilt)
    assert path.read_bytes() == before
    write_record(path, record())
    assert read_record(path).complete
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.json", "taken"]


def test_records_are_not_changed_after_they_were_made() -> None:
    with pytest.raises(ValidationError):
        record().rows[0].seconds = 1e-9
