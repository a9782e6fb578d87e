"""The page on scale: its counts by hand, its seconds from made-up rates, and the README's section."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic")

from made_records import limit, record, row

from bench import scale
from bench.scale_counts import (
    FEDERATIONS,
    MOVED,
    OPENED,
    Federation,
    Rates,
    Seconds,
    machines_for,
    rates,
    seconds,
)
from fastagg.bench.cases import FLORA_RANKS, Case, Projection
from fastagg.bench.record import read_record, write_record

RECORDS = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*-threads-*.json"))

CASE = Case(
    "small", "", 1, (Projection("q", 300, 200, FLORA_RANKS), Projection("v", 100, 200, FLORA_RANKS))
)
SMALL = Federation("small", CASE, layers=3, clients=20)
RATES = Rates(moved=1e3, client=0.5, copied=1e9, fold=1e6, decompose=1e5, sketch=1e4)


def test_counts_of_a_small_model() -> None:
    """Six modules: three of 300 x 200 and three of 100 x 200; twenty clients of rank 16 in the mean."""
    assert sum(FLORA_RANKS) / len(FLORA_RANKS) == 16
    assert (SMALL.rows, SMALL.modules) == (320, 6)
    assert SMALL.entries == 3 * (300 * 200 + 100 * 200) == 240_000
    assert SMALL.ends == 3 * (500 + 300) == 2_400
    assert SMALL.client_bytes == 320 * 2_400 * 2
    assert SMALL.dense_bytes == 240_000 * 4
    assert SMALL.handout_bytes == (64 + 32 + 16 + 8 + 4) * 2_400 * 2
    assert SMALL.condensed_bytes == 128 * 2_400 * 4
    assert SMALL.fold_flops == 2 * 240_000 * 320
    assert SMALL.fold_bytes == 20 * 2 * 960_000
    # Six passes with 128 columns, of which a module of 100 rows has but 100.
    assert SMALL.decompose_flops == 2 * 6 * 3 * (128 * 300 * 200 + 100 * 100 * 200)
    assert SMALL.sketch_flops == 2 * 6 * 320 * 128 * 2_400 + 320**2 * 2_400


def test_headers_are_those_that_a_client_writes(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = {}
    for layer in range(3):
        for projection in CASE.projections:
            key = f"base_model.model.model.layers.{layer}.{projection.name}.lora_"
            state[f"{key}A.weight"] = torch.zeros(16, projection.n, dtype=torch.bfloat16)
            state[f"{key}B.weight"] = torch.zeros(projection.m, 16, dtype=torch.bfloat16)
    file = tmp_path / "adapter_model.safetensors"
    safetensors.save_file(state, file, metadata={"format": "pt"})
    data = sum(tensor.nbytes for tensor in state.values())
    theirs = 20 * (file.stat().st_size - data)
    # Files of FastAgg's own are aligned to 64 bytes, those of safetensors to 8.
    assert theirs <= SMALL.header_bytes < theirs + 20 * 64


def test_seconds_are_counts_over_rates() -> None:
    one = seconds(SMALL, RATES, 1)
    moved = SMALL.client_bytes + SMALL.handout_bytes
    assert one == Seconds(
        open=20 * 0.5,
        move=(moved + SMALL.header_bytes) / 1e3,
        fold=SMALL.fold_flops / 1e6,
        decompose=SMALL.decompose_flops / 1e5,
    )
    assert one.total == one.open + one.move + one.fold + one.decompose
    two = seconds(SMALL, RATES, 2)
    assert (two.open, two.fold, two.decompose) == (one.open, one.fold / 2, one.decompose / 2)
    assert two.move == pytest.approx((moved / 2 + SMALL.header_bytes) / 1e3)


def test_adding_takes_what_memory_takes_where_that_is_more() -> None:
    slow = Rates(moved=1e3, client=0.5, copied=1e3, fold=1e6, decompose=1e5, sketch=1e4)
    assert SMALL.fold_bytes / 1e3 > SMALL.fold_flops / 1e6
    assert seconds(SMALL, slow, 2).fold == SMALL.fold_bytes / 1e3 / 2


def test_no_machine_has_less_than_the_largest_module() -> None:
    """One of the three large modules is a quarter of the work."""
    assert SMALL.largest_share == 0.25
    assert SMALL.widest == 4
    four, many = (seconds(SMALL, RATES, machines) for machines in (4, 100))
    assert many == four
    assert machines_for(SMALL, RATES, four.total) == 4
    assert machines_for(SMALL, RATES, seconds(SMALL, RATES, 3).total) == 3
    assert machines_for(SMALL, RATES, 1e9) == 1
    assert machines_for(SMALL, RATES, 0.999 * four.total) is None


def test_rates_are_read_off_the_rows() -> None:
    rows = [
        row("fastagg aggregate", 3.0, case=MOVED, op="end-to-end", bytes=5e9),
        row("fastagg auto", 1.0, case=MOVED, op="svd"),
        row("fastagg aggregate", 4.0, case=OPENED, op="end-to-end", clients=1000),
        row("read, kernels, write: the sum", 1.0, case=OPENED, op="end-to-end", clients=1000),
        row("fastagg reconstruct_, of the stack", 2.0, case="small", op="merge", flops=8e9),
        limit("memory copy", 2.0, case="small", op="merge", bytes=6e9),
        row("fastagg dense", 4.0, case="small", op="svd", flops=8e9),
        row("fastagg randomized", 1.0, case="small", op="svd", flops=1e9, wide_flops=2e9),
    ]
    found = rates([record(rows)], CASE)
    assert found == Rates(
        moved=2.5e9, client=0.003, copied=3e9, fold=4e9, decompose=2e9, sketch=3e9
    )


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0.0042, "4.2 ms"), (119, "119 s"), (120, "2 min"), (7300, "2.03 h"), (1.8e6, "20.8 days")],
)
def test_durations(amount: float, text: str) -> None:
    assert scale.duration(amount) == text


def test_the_readme_says_what_the_records_say() -> None:
    scale.main([*map(str, RECORDS), "--check"])


def test_the_section_is_written_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{scale.BEGIN}\n{scale.END}\nafter\n")
    monkeypatch.setattr(scale, "README", readme)
    paths = list(map(str, RECORDS))
    with pytest.raises(SystemExit, match="does not say"):
        scale.main([*paths, "--check"])
    scale.main(paths)
    scale.main([*paths, "--check"])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    for federation in FEDERATIONS:
        assert f"**{federation.name}.** The limit is adding B A into dW" in text
    assert "derived" in text
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        scale.main(paths)


def test_another_machines_records_change_the_seconds_and_not_the_counts(tmp_path: Path) -> None:
    def faster(path: Path) -> Path:
        found = read_record(path)
        rows = [each.model_copy(update={"seconds": each.seconds / 10}) for each in found.rows]
        write_record(tmp_path / path.name, found.model_copy(update={"rows": rows}))
        return tmp_path / path.name

    records = [read_record(path) for path in RECORDS]
    quick = [read_record(faster(path)) for path in RECORDS]
    for federation in FEDERATIONS:
        slow, fast = (
            seconds(federation, rates(each, federation.case), 8) for each in (records, quick)
        )
        assert slow.total == pytest.approx(10 * fast.total)
