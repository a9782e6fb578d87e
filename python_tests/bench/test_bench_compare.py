"""Two records beside each other: each verdict, the edges of the noise, the notes, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from hypothesis import assume, given
from hypothesis import strategies as st
from made_records import limit, record, row
from typer.testing import CliRunner, Result

from fastagg.bench.compare import Matched, compare
from fastagg.bench.noise import LEAST, UNKNOWN
from fastagg.bench.record import Record, Row, write_record
from fastagg.cli.app import app
from fastagg.errors import InvalidInput


def pair(old: Row, new: Row) -> Matched:
    (matched,) = compare(record([old]), record([new])).matched
    return matched


def tight(seconds: float, noise: float | None = 0.05, contender: str = "fastagg auto") -> Row:
    """Quartiles that do not matter beside the noise."""
    return row(contender, seconds, low=seconds, high=seconds, noise=noise)


seconds = st.floats(1e-9, 1e4)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    median = draw(seconds)
    return row(
        draw(st.sampled_from(["fastagg auto", "fastagg qr", "dense", "cat"])),
        median,
        low=median * draw(st.floats(0.5, 1)),
        high=median * draw(st.floats(1, 2)),
        noise=draw(st.none() | st.floats(0, 2)),
        error=draw(st.none() | st.floats(0, 1)),
        orthogonality=draw(st.none() | st.floats(0, 1)),
    )


@given(st.lists(rows(), unique_by=lambda each: each.key))
def test_a_record_beside_itself_is_the_same(drawn: list[Row]) -> None:
    made = record(drawn)
    found = compare(made, made)
    assert [(each.speed, each.accuracy, each.rescaled) for each in found.matched] == [
        ("same", "same", False)
    ] * len(drawn)
    assert not found.worse and not found.missing and not found.added and not found.notes


@given(rows(), rows())
def test_what_is_slower_one_way_is_faster_the_other(one: Row, other: Row) -> None:
    other = other.model_copy(update={"contender": one.contender, "kind": one.kind})
    there, back = pair(one, other), pair(other, one)
    mirrored = {"slower": "faster", "faster": "slower", "same": "same"}
    assert back.speed == mirrored[there.speed]
    assert there.noise == back.noise
    if there.accuracy == "more accurate":
        assert back.accuracy == "less accurate"
    if there.speed == "slower":
        assert other.seconds > one.seconds and other.low > one.high


@given(noise=st.floats(0, 1), other=st.floats(0, 1), ratio=st.floats(0.2, 5))
def test_a_difference_within_the_larger_noise_is_none(noise: float, other: float, ratio: float) -> None:
    edge = 1 + max(noise, other, LEAST)
    assume(abs(ratio - edge) > 1e-9 and abs(1 / ratio - edge) > 1e-9)
    found = pair(tight(1.0, noise), tight(ratio, other))
    expected = "slower" if ratio > edge else "faster" if 1 / ratio > edge else "same"
    assert found.speed == expected
    assert compare(record([tight(1.0, noise)]), record([tight(ratio, other)])).worse == (
        expected == "slower"
    )


def test_the_edge_of_the_noise_is_within_it() -> None:
    assert pair(tight(1.0, 0.25), tight(1.25, 0.0)).speed == "same"
    assert pair(tight(1.0, 0.25), tight(math.nextafter(1.25, 2), 0.0)).speed == "slower"
    assert pair(tight(1.25, 0.25), tight(1.0, 0.0)).speed == "same"


def test_quartiles_that_overlap_are_no_difference() -> None:
    old = row(seconds=1.0, low=0.9, high=2.5, noise=0.0)
    for low, speed in ((2.4, "same"), (2.5, "same"), (2.6, "slower")):
        new = row(seconds=3.0, low=low, high=3.1, noise=0.0)
        assert pair(old, new).speed == speed
        assert pair(new, old).speed == ("faster" if speed == "slower" else "same")


def test_a_row_without_noise_takes_the_median_of_its_op() -> None:
    """One that was stalled, of 52, must not hide all differences."""
    once = tight(1.0, None)
    assert pair(once, tight(1.0, 0.0)).noise == UNKNOWN
    others = [
        row("cat", noise=0.3),
        row("dense", noise=0.4),
        row("stalled", noise=52.0),
        row("mm", op="merge", noise=0.9),
    ]
    (found, *_) = compare(record([once, *others]), record([tight(1.0, 0.0)])).matched
    assert found.noise == 0.4
    assert pair(tight(1.0, 0.0), tight(1.0, 0.0)).noise == LEAST


@pytest.mark.parametrize("field", ["error", "orthogonality"])
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (1e-7, 2e-7, "same"),
        (1e-7, 2.01e-7, "less accurate"),
        (2.01e-7, 1e-7, "more accurate"),
        (1e-15, 1e-12, "same"),  # rounding
        (1e-15, 1.1e-12, "less accurate"),
        (0.0, 1e-11, "less accurate"),
        (1e-7, math.nan, "less accurate"),
        (1e-7, math.inf, "less accurate"),
        (1e-7, None, "less accurate"),  # JSON's not-a-number
        (None, 1e-7, "more accurate"),
        (None, None, "same"),
        (math.nan, math.nan, "same"),
    ],
)
def test_errors(field: str, old: float | None, new: float | None, expected: str) -> None:
    found = pair(row(**{field: old}), row(**{field: new}))
    assert found.accuracy == expected and found.speed == "same"
    assert found.worse == (expected == "less accurate")


def test_a_better_error_does_not_make_up_for_worse_vectors() -> None:
    found = pair(row(error=1e-3, orthogonality=1e-8), row(error=1e-7, orthogonality=1e-3))
    assert found.accuracy == "less accurate"


def test_only_fastaggs_own_rows_make_it_worse() -> None:
    old = [row(), row("dense"), limit()]
    slower = [row(), row("dense", 1.0, error=0.5), limit(seconds=1.0)]
    assert not compare(record(old), record(slower)).worse
    assert compare(record(old), record([row(seconds=1.0), *slower[1:]])).worse


def test_rows_that_one_record_lacks_are_listed_and_no_failure() -> None:
    old, new = record([row(), row("dense")]), record([row("dense"), row("fastagg qr")])
    found = compare(old, new)
    assert [each.contender for each in found.missing] == ["fastagg auto"]
    assert [each.contender for each in found.added] == ["fastagg qr"]
    assert not found.worse
    found = compare(old, record([]))
    assert len(found.missing) == 2 and not found.matched and not found.worse


def test_rows_timed_on_other_modules_are_compared_and_marked() -> None:
    found = pair(row(), row(seconds=1.0, timed_modules=4))
    assert found.rescaled and found.speed == "slower"


@pytest.mark.parametrize(
    ("field", "value"), [("device", "cuda"), ("dtype", "float32"), ("factors", "signal")]
)
def test_other_measurements_are_not_compared(field: str, value: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        compare(record([row()]), record([row()], **{field: value}))
    assert caught.value.field == field and caught.value.cure
    assert value in str(caught.value) and "old record" in str(caught.value)


def test_other_settings_and_machines_are_noted() -> None:
    changed = {"threads": 1, "effort": "full", "seed": 7, "cpu": "Another", "gpu": "H100",
               "cores": 64, "torch": "2.14.0"}  # fmt: skip
    found = compare(record([row()]), record([row()], complete=False, **changed))
    assert found.notes[0].startswith("The new record is incomplete")
    assert [note.split(":")[0] for note in found.notes[1:]] == list(changed)
    assert "gpu: none in the old record, H100 in the new." in found.notes


def test_limits_that_moved_tell_of_the_machine() -> None:
    old = [limit(), limit("matrix product", flops=1e9), limit("read, kernels, write: the sum")]
    new = [each.model_copy(update={"seconds": 3e-4, "low": 3e-4, "high": 3e-4}) for each in old]
    assert compare(record(old), record(new)).notes == (
        "tinyllama-qv-10, svd: the machine's memory copy is 3.0 times slower and matrix product is 3.0 "
        "times slower: the machine changed, not the code.",
        # That one has FastAgg's own kernels in it.
        "tinyllama-qv-10, svd: the limit read, kernels, write: the sum is 3.0 times slower.",
    )
    notes = compare(record(new[:1]), record(old[:1], torch="2.14.0")).notes
    assert notes[-1].endswith("3.0 times faster: the machine or torch changed, not the code.")


# The command.


def fastagg(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "compare", *map(str, arguments)])


def written(path: Path, made: Record) -> Path:
    write_record(path, made)
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return written(tmp_path / "old.json", record([row(), row("dense"), limit()]))


def test_the_command_says_so_where_nothing_changed(old: Path) -> None:
    result = fastagg(old, old)
    assert result.exit_code == 0, result.output
    assert "Nothing changed beyond the noise, in 3 rows." in result.output


def test_the_command_fails_where_fastagg_got_slower(old: Path, tmp_path: Path) -> None:
    rows = [row(seconds=2e-3, error=1e-3), row("dense", 1e-4), row("[red]cat[/]")]
    new = written(tmp_path / "new.json", record(rows, seed=1))
    result = fastagg(old, new)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    flat = " ".join(result.output.split())
    assert "2.00 times slower, less accurate" in flat and "10.00 times faster" in flat
    assert flat.index("slower") < flat.index("faster")
    assert "1 row of FastAgg got worse; 0 rows of 2 did not change" in flat
    assert "Only in the old record: tinyllama-qv-10: svd (1 row)." in flat
    assert "New: tinyllama-qv-10: svd (1 row)." in flat
    assert "seed: 0 in the old record, 1 in the new." in flat


def test_the_command_passes_where_only_a_baseline_got_slower(old: Path, tmp_path: Path) -> None:
    new = written(tmp_path / "new.json", record([row(), row("dense", 1.0), limit()]))
    result = fastagg(old, new)
    assert result.exit_code == 0, result.output
    assert "No row of FastAgg got worse; 2 rows of 3 did not change" in " ".join(result.output.split())


def test_json_is_one_document(old: Path, tmp_path: Path) -> None:
    rows = [row(seconds=2e-3, error=math.inf), row("cat")]
    result = fastagg(old, written(tmp_path / "new.json", record(rows, seed=1)), "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["worse"] and document["notes"] == ["seed: 0 in the old record, 1 in the new."]
    (changed,) = document["rows"]
    assert changed["speed"] == "slower" and changed["accuracy"] == "less accurate"
    assert changed["ratio"] == pytest.approx(2) and changed["kind"] == "fastagg"
    assert {each["contender"] for each in document["missing"]} == {"dense", "memory copy"}
    assert [each["contender"] for each in document["added"]] == ["cat"]
    assert not json.loads(fastagg(old, old, "--json").stdout)["worse"]


@pytest.mark.parametrize("order", [1, -1])
def test_files_that_are_no_records_are_refused_in_a_sentence(
    old: Path, tmp_path: Path, order: int
) -> None:
    text = old.read_text()
    other = json.loads(text)
    cut, version, field = (tmp_path / f"{name}.json" for name in ("cut", "version", "field"))
    cut.write_text(text[: len(text) // 2])
    version.write_text(json.dumps({**other, "schema_version": 99}))
    field.write_text(json.dumps({**other, "rows": [{**other["rows"][0], "seconds": -1}]}))
    for path, words in (
        (cut, ["is not a record of `fastagg bench`", "a JSON document"]),
        (version, ["schema_version", "expected 2", "got 99"]),
        (field, ["rows.0.seconds"]),
        (tmp_path / "nowhere.json", ["No such file", "nowhere.json"]),
        (tmp_path, ["directory"]),
    ):
        result = fastagg(*[old, path][::order])
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), path
        assert result.stdout == "" and "unexpected" not in result.stderr
        for word in words:
            assert word in " ".join(result.stderr.split()), (word, result.stderr)


def test_records_of_other_dtypes_are_refused(old: Path, tmp_path: Path) -> None:
    new = written(tmp_path / "new.json", record([row()], dtype="float32"))
    result = fastagg(old, new)
    assert result.exit_code == 1 and "dtype" in result.stderr and "float32" in result.stderr
    result = fastagg(old, new, "--json")
    assert json.loads(result.stdout)["error"]["type"] == "InvalidInput"
