"""ops.scan against torch's own isfinite and float64 sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import CODES, DTYPES, FlatWriter, bytes_of, integer, normal

from fastagg import ops


def spans_of(writer: FlatWriter, tensors: list[torch.Tensor], gaps: list[int]) -> torch.Tensor:
    rows = [
        [writer.add(tensor, gap), tensor.numel(), CODES[tensor.dtype]]
        for tensor, gap in zip(tensors, gaps, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 20000), max_size=6),
    bad=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_counts_and_sums_of_any_tensors(counts: list[int], bad: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tensors, expected = [], []
    for count in counts:
        tensor = normal(rng, count, dtype=DTYPES[integer(rng, 0, 2)])
        chosen = torch.randperm(count, generator=rng)[: integer(rng, 0, bad)]
        tensor[chosen] = torch.tensor([torch.nan, torch.inf, -torch.inf])[
            torch.randint(3, (len(chosen),), generator=rng)
        ].to(tensor.dtype)
        tensors.append(tensor)
        expected.append(len(chosen))
    writer = FlatWriter()
    spans = spans_of(writer, tensors, [integer(rng, 0, 7) for _ in tensors])
    nonfinite, sums = ops.scan(writer.flat(), spans)
    assert nonfinite.tolist() == expected
    for found, tensor, count in zip(sums, tensors, expected, strict=True):
        exact = tensor.double().square().sum()
        if count:
            assert not torch.isfinite(found)
        else:
            torch.testing.assert_close(found, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_of_a_tensor_longer_than_the_kernel_s_tasks(
    dtype: torch.dtype, rng: torch.Generator
) -> None:
    count = 2**18 + 4096 + 5
    tensor = normal(rng, count, dtype=dtype)
    for place in (0, 4095, 4096, 2**18 - 1, 2**18, 2**18 + 4096, count - 1):
        changed = tensor.clone()
        changed[place] = torch.inf
        nonfinite, sums = ops.scan(changed, torch.tensor([[0, count, CODES[dtype]]]))
        assert nonfinite.tolist() == [1]
        assert torch.isinf(sums[0])
    _, sums = ops.scan(tensor, torch.tensor([[0, count, CODES[dtype]]]))
    torch.testing.assert_close(sums[0], tensor.double().square().sum(), rtol=1e-13, atol=0)


def test_extremes_of_float32_are_finite() -> None:
    tensor = torch.tensor([torch.finfo(torch.float32).max, 1e-45, -0.0]).repeat(50)
    nonfinite, sums = ops.scan(tensor, torch.tensor([[0, 150, 0]]))
    assert nonfinite.tolist() == [0]
    torch.testing.assert_close(sums[0], tensor.double().square().sum(), rtol=1e-13, atol=0)


def test_overlapping_empty_and_strided(rng: torch.Generator) -> None:
    tensor = normal(rng, 100)
    spans = torch.tensor([[0, 100, 0], [40, 10, 0], [400, 0, 2], [0, 0, 1]])
    _, sums = ops.scan(tensor, spans)
    square = tensor.double().square()
    expected = torch.stack([square.sum(), square[10:20].sum(), *torch.zeros(2).double()])
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=0)
    strided = torch.stack([bytes_of(tensor)] * 2, 1)[:, 0]
    assert torch.equal(ops.scan(strided, spans.t().contiguous().t())[1], sums)
    nonfinite, sums = ops.scan(torch.empty(0, dtype=torch.uint8), spans[:0])
    assert nonfinite.shape == sums.shape == (0,)


def test_offsets_beyond_two_gibibytes(rng: torch.Generator, huge_flat: torch.Tensor) -> None:
    tensor = normal(rng, 1000)
    tensor[3] = torch.nan
    offset = 2**31 + 2**20 + 3
    huge_flat[offset : offset + 4000] = bytes_of(tensor)
    spans = torch.tensor([[offset, 1000, 0], [offset + 400, 900, 0]])
    nonfinite, sums = ops.scan(huge_flat, spans)
    assert nonfinite.tolist() == [1, 0]
    torch.testing.assert_close(sums[1], tensor[100:].double().square().sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("span", "words"),
    [
        ((0, 17, 0), ["row 0", "64 bytes", "17 x 1 elements of 4 bytes at byte 0"]),
        ((0, 33, 1), ["33 x 1 elements of 2 bytes"]),
        ((1, 16, 0), ["at byte 1"]),
        ((-1, 1, 0), ["at byte -1"]),
        ((65, 0, 0), ["at byte 65"]),
        ((0, -1, 0), ["-1 x 1 elements"]),
        ((0, 2**62, 0), ["inside the buffer"]),
        ((2**63 - 1, 2**63 - 1, 0), ["inside the buffer"]),
        ((0, 1, 3), ["dtype code", "got 3"]),
        ((0, 1, -1), ["dtype code", "got -1"]),
    ],
)
def test_argument_errors(span: tuple[int, int, int], words: list[str]) -> None:
    with pytest.raises(RuntimeError, match=r"fastagg::scan: argument 'spans'") as caught:
        ops.scan(torch.zeros(64, dtype=torch.uint8), torch.tensor([span]))
    for word in words:
        assert word in str(caught.value)


def test_a_table_of_another_shape_or_dtype() -> None:
    flat = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"'spans': expected shape \(rows, 3\), got \(1, 2\)"):
        ops.scan(flat, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"'spans': expected shape \(rows, 3\), got \(3\)"):
        ops.scan(flat, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"'spans': expected dtype Long, got Int"):
        ops.scan(flat, torch.zeros(1, 3, dtype=torch.int32))
