"""The peak of memory is that of the buffers which a run takes, also of those that it gives back."""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_cases import CPU

from fastagg.bench.memory import available_bytes, peak_bytes, sampled_peak_bytes

Peak = Callable[[torch.device, Callable[[], Any]], tuple["int | None", Any]]

SIZE = 96 << 20
BOTH = pytest.mark.parametrize("peak", [peak_bytes, sampled_peak_bytes])

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is known there")


def of(peak: Peak, run: Callable[[], Any]) -> tuple[int, Any]:
    found, result = peak(CPU, run)
    if found is None:
        pytest.skip("this kernel does not tell")
    return found, result


def hold(size: int) -> torch.Tensor:
    """Pages that are written, for long enough to be seen by who looks every millisecond."""
    held = torch.ones(size, dtype=torch.uint8)
    time.sleep(0.05)
    return held


@BOTH
def test_a_buffer_that_is_given_back(peak: Peak) -> None:
    def run() -> str:
        hold(SIZE)
        return "its result"

    found, result = of(peak, run)
    assert result == "its result"
    assert found == pytest.approx(SIZE, rel=0.1)


@BOTH
def test_a_result_counts(peak: Peak) -> None:
    found, result = of(peak, lambda: hold(SIZE))
    assert result.nbytes == SIZE
    assert found == pytest.approx(SIZE, rel=0.1)


@BOTH
def test_the_largest_of_several_counts_and_not_their_sum(peak: Peak) -> None:
    def run() -> None:
        for part in (1, 3, 2):
            hold(part * SIZE // 3)

    assert of(peak, run)[0] == pytest.approx(SIZE, rel=0.1)


@BOTH
def test_what_was_held_before_does_not_count(peak: Peak) -> None:
    before = hold(SIZE)
    found, _ = of(peak, lambda: hold(SIZE // 4))
    assert found == pytest.approx(SIZE // 4, rel=0.2)
    assert before.nbytes == SIZE


@BOTH
def test_a_higher_peak_before_does_not_count(peak: Peak) -> None:
    hold(2 * SIZE)
    assert of(peak, lambda: hold(SIZE))[0] == pytest.approx(SIZE, rel=0.1)


@BOTH
def test_small_buffers_that_the_allocator_would_reuse_count(peak: Peak) -> None:
    """glibc keeps freed memory of less than its threshold: a second run takes it anew all the same."""

    def run() -> None:
        kept = [torch.ones(64 << 10, dtype=torch.uint8) for _ in range(SIZE // 4 // (64 << 10))]
        time.sleep(0.05)
        assert len(kept) > 100

    first, again = of(peak, run)[0], of(peak, run)[0]
    assert first == pytest.approx(SIZE // 4, rel=0.2)
    assert again == pytest.approx(SIZE // 4, rel=0.2)


@BOTH
def test_a_run_that_takes_nothing(peak: Peak) -> None:
    assert of(peak, lambda: time.sleep(0.01))[0] < SIZE // 20


@BOTH
def test_an_error_of_the_run_is_its_own(peak: Peak) -> None:
    with pytest.raises(ZeroDivisionError):
        peak(CPU, lambda: 1 // 0)


def test_mapped_files_count_for_the_high_water_mark_alone(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"x" * SIZE)

    def run() -> int:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            total = sum(mapped[at] for at in range(0, SIZE, 4096))
            time.sleep(0.02)
        return total

    found, total = of(sampled_peak_bytes, run)
    assert total == ord("x") * SIZE // 4096
    assert found < SIZE // 10
    assert of(peak_bytes, run)[0] == pytest.approx(SIZE, rel=0.1)


def test_available_memory_is_what_the_system_says() -> None:
    psutil = pytest.importorskip("psutil")
    assert available_bytes(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.25)
