"""The scan kernel against torch's own isfinite and float64 sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt.ragged import scan
from stacks import CODES, DTYPES, FlatWriter, integer, normal
from torch import Tensor

BAD = torch.tensor([torch.nan, torch.inf, -torch.inf])


def spans_of(writer: FlatWriter, tensors: list[Tensor], gaps: list[int]) -> Tensor:
    rows = [
        [writer.add(tensor, gap), tensor.numel(), CODES[tensor.dtype]]
        for tensor, gap in zip(tensors, gaps, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 20000)), max_size=3),
    bad=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_counts_and_sums_of_any_tensors(counts: list[int], bad: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tensors, expected = [], []
    for count in counts:
        tensor = normal(rng, count, dtype=DTYPES[integer(rng, 0, 2)])
        chosen = torch.randperm(count, generator=rng)[: integer(rng, 0, bad)]
        tensor[chosen] = BAD[torch.randint(3, (len(chosen),), generator=rng)].to(tensor.dtype)
        tensors.append(tensor)
        expected.append(len(chosen))
    writer = FlatWriter()
    spans = spans_of(writer, tensors, [integer(rng, 0, 7) for _ in tensors])
    nonfinite, sums = scan(writer.flat(), spans)
    assert nonfinite.tolist() == expected
    for found, tensor, count in zip(sums, tensors, expected, strict=True):
        if count:
            assert not torch.isfinite(found)
        else:
            torch.testing.assert_close(found, tensor.double().square().sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_of_a_tensor(dtype: torch.dtype, rng: torch.Generator) -> None:
    """At the ends of vectors, of a block's reach, and of what its threads have under way."""
    count = 8 * 512 * 4 + 8 * 512 + 13
    tensor = normal(rng, count, dtype=dtype)
    places = (0, 7, 8, 8 * 512 - 1, 8 * 512, 8 * 512 * 4, count - 6, count - 5, count - 1)
    copies = [tensor.clone() for _ in places]
    for copy, place in zip(copies, places, strict=True):
        copy[place] = torch.inf
    writer = FlatWriter()
    spans = spans_of(writer, copies, [0, 1] * 4 + [0])
    nonfinite, sums = scan(writer.flat(), spans)
    assert nonfinite.tolist() == [1] * len(places)
    assert (sums == torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_has_the_same_sum_wherever_it_lies(dtype: torch.dtype, rng: torch.Generator) -> None:
    tensor = normal(rng, 5003, dtype=dtype)
    writer = FlatWriter()
    spans = spans_of(writer, [tensor] * 6, [0, 1, 2, 3, 4, 8])
    nonfinite, sums = scan(writer.flat(), spans)
    assert not nonfinite.any()
    assert (sums == sums[0]).all()


def test_an_impossible_span_is_not_read(rng: torch.Generator) -> None:
    flat = normal(rng, 16)
    rows = [
        (0, 16, 0),
        (4, 16, 0),
        (-4, 4, 0),
        (0, -1, 0),
        (0, 2**62, 1),
        (2**63 - 1, 1, 2),
        (65, 0, 0),
        (64, 0, 0),
        (0, 4, 3),
        (0, 4, -(2**63)),
        (1, 31, 1),
        (1, 32, 1),
    ]
    nonfinite, sums = scan(flat, torch.tensor(rows))
    impossible = torch.tensor([False] + [True] * 6 + [False] + [True] * 2 + [False, True])
    assert torch.equal(nonfinite == -1, impossible)
    assert not sums[impossible].any()
    torch.testing.assert_close(sums[0], flat.double().square().sum(), rtol=1e-14, atol=0)


def test_nothing_to_scan() -> None:
    nonfinite, sums = scan(torch.empty(0), torch.empty(0, 3, dtype=torch.int64))
    assert nonfinite.shape == sums.shape == (0,)
    nonfinite, sums = scan(torch.empty(0), torch.tensor([[0, 0, 2]]))
    assert nonfinite.tolist() == [0]
    assert sums.tolist() == [0.0]
