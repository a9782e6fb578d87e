"""Which operations are measured in which cases, and one real run from the beginning to its record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic")

from fastagg.bench.cases import CASES, SERIES
from fastagg.bench.record import Record, Settings, read_record, write_record
from fastagg.bench.suite import OPERATIONS, Pair, pairs, run
from fastagg.errors import InvalidInput

OPS = ["stack", "reconstruct", "merge", "svd", "redistribute", "round", "update_gram", "end-to-end"]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A run sets them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def names(found: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.case.name, pair.operation.name) for pair in found]


def test_operations() -> None:
    assert list(OPERATIONS) == [*OPS, "import"]
    assert all(operation.name == name for name, operation in OPERATIONS.items())


@pytest.mark.parametrize(
    ("effort", "cases"),
    [("quick", ["square-1024"]), ("standard", ["tinyllama-qv-10", "llama7b-qv-10"])],
)
def test_what_is_measured_where_nothing_is_asked_for(effort: str, cases: list[str]) -> None:
    expected = [(case, op) for case in cases for op in OPS]
    assert names(pairs([], [], effort)) == [*expected, ("fresh-interpreter", "import")]


def test_full_is_every_case_and_of_series_what_is_read_off_them() -> None:
    found = names(pairs([], [], "full"))
    in_series = {case.name for series in SERIES.values() for case in series.cases}
    for case in CASES:
        ops = [op for name, op in found if name == case]
        assert ops == (["stack", "reconstruct", "svd", "end-to-end"] if case in in_series else OPS)
    assert found[-1] == ("fresh-interpreter", "import")
    assert len(found) == len(set(found))


@pytest.mark.parametrize("effort", ["quick", "standard", "full"])
def test_what_is_asked_for_is_measured_whatever_the_effort(effort: str) -> None:
    assert names(pairs(["square-256", "llama7b-all-*"], ["svd", "stack"], effort)) == [
        (case, op)
        for case in ("square-256", "llama7b-all-10", "llama7b-all-100")
        for op in ("svd", "stack")
    ]
    assert names(pairs(["square-256"], [], effort)) == [("square-256", op) for op in OPS]
    found = names(pairs([], ["svd"], effort))
    assert {op for _, op in found} == {"svd"}
    assert found == [(case, "svd") for case in dict.fromkeys(name for name, _ in pairs_of(effort))]


def pairs_of(effort: str) -> list[tuple[str, str]]:
    return [pair for pair in names(pairs([], [], effort)) if pair[1] != "import"]


def test_the_import_has_a_case_of_its_own() -> None:
    assert names(pairs(["square-256"], ["import"], "quick")) == [("fresh-interpreter", "import")]
    assert names(pairs(["square-*"], ["import", "stack"], "quick")).count(
        ("fresh-interpreter", "import")
    ) == 1  # fmt: skip


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no such operation") as caught:
        pairs([], ["stack", "stak"], "quick")
    assert caught.value.field == "--op"
    assert "'stak'" in str(caught.value)
    assert "update_gram" in str(caught.value)
    with pytest.raises(InvalidInput, match="no such case") as caught:
        pairs(["square-3"], ["stack"], "quick")
    assert caught.value.field == "--case"


def settings(**changes: object) -> Settings:
    values = {
        "device": "cpu",
        "threads": 2,
        "effort": "quick",
        "dtype": "bfloat16",
        "factors": "random",
        "seed": 5,
    }
    return Settings.model_validate({**values, **changes})


def test_a_run_from_the_beginning_to_its_record(tmp_path: Path) -> None:
    wanted = pairs(["square-256"], ["stack", "svd"], "quick")
    path = tmp_path / "record.json"
    states: list[tuple[bool, list[tuple[str, str]], str]] = []
    said: list[str] = []

    def done(record: Record, pair: Pair) -> None:
        write_record(path, record)
        assert read_record(path) == record
        states.append((record.complete, record.tables(), pair.operation.name))

    record = run(wanted, settings(), say=said.append, done=done)
    stack, svd = ("square-256", "stack"), ("square-256", "svd")
    assert states == [(False, [stack], "stack"), (True, [stack, svd], "svd")]
    assert record.complete
    assert read_record(path) == record
    assert record.settings == settings()
    assert record.machine.torch == torch.__version__
    assert said[0].startswith("[1/2] square-256, stack: ")
    assert said[-1].startswith("[2/2] square-256, svd: ")

    for case, op in record.tables():
        rows = record.of(case, op)
        assert len({row.contender for row in rows}) == len(rows)
        assert {"fastagg", "baseline", "limit"} == {row.kind for row in rows}
        for row in rows:
            assert 0 < row.low <= row.seconds <= row.high
            assert (row.clients, row.rows, row.modules, row.timed_modules) == (10, 160, 1, 1)
            assert row.bytes_in == 2 * 160 * (256 + 256)
            assert (row.error is None) == (row.kind == "limit")
            assert (row.share_of_limit is None) == (row.kind == "limit")
            assert bool(row.ratios) == (row.kind == "fastagg")
            if row.error is not None:
                assert math.isfinite(row.error)
                assert row.error < (0.05 if "lowrank" in row.contender else 1e-5)
                assert (row.orthogonality is not None) == (op == "svd")
    # Contenders are left out by name, or there.
    left = {(entry.op, entry.contender) for entry in record.left_out}
    present = {(row.op, row.contender) for row in record.rows}
    assert not left & present
    assert len(left | present) == 6 + 12


def test_nothing_to_do_is_complete() -> None:
    record = run([], settings())
    assert record.complete
    assert record.rows == []


def test_the_import_is_measured() -> None:
    """Its work is not counted, its limits are none; nobody imports fastagg without torch."""
    record = run(pairs([], ["import"], "quick"), settings())
    rows = {row.contender: row for row in record.rows}
    assert list(rows) == ["import fastagg", "import torch", "an empty program"]
    assert record.left_out == []
    assert all(row.share_of_limit is None and row.timed_modules == 1 for row in record.rows)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_what_was_asked_for(threads: int) -> None:
    seen: list[int] = []
    run(
        pairs(["square-256"], ["redistribute"], "quick"),
        settings(threads=threads),
        say=lambda text: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {threads}
