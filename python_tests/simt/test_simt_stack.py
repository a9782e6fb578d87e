"""The stack kernels against the clients' own factors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt.ragged import int64, library, stack, stack_into
from stacks import CODES, DTYPES, Bucket, FlatWriter, normal, random_bucket

# A product w s A is rounded to fp32, and then to the slab's dtype.
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def check_unscaled(bucket: Bucket, dtype: torch.dtype) -> None:
    A, Bt, nonfinite, sums = stack(bucket, dtype)
    a, bt = bucket.slabs()
    # float64 holds every factor exactly, so that one rounding is torch's own cast of the factor.
    torch.testing.assert_close(A, a.float().to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(Bt, bt.float().to(dtype), rtol=0, atol=0)
    assert nonfinite.shape == (len(bucket.slots), 2)
    assert not nonfinite.any()
    expected = torch.stack([a.square().sum(2), bt.square().sum(2)])
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 35), max_size=4),
    modules=st.integers(0, 2),
    m=st.integers(0, 40),
    n=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    lacking=st.sampled_from([0.0, 0.5]),
    padding=st.integers(0, 9),
    aligned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_unscaled_rows_are_the_factors_to_the_bit(
    ranks: list[int], dtype: torch.dtype, seed: int, **shape: Any
) -> None:
    rng = torch.Generator().manual_seed(seed)
    check_unscaled(random_bucket(rng, ranks=ranks, **shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "ranks"),
    [
        (129, 2056, [64, 4]),  # a piece of A and a row more; a tile of B and a line more
        (127, 8, [100, 1, 31]),  # ranks across tiles: runs of whole and of broken vectors
        (256, 64, [16, 4, 4, 8, 32]),  # every vector aligned, and one run for each client
        (300, 33, [62, 3, 65]),
    ],
)
def test_sizes_on_both_sides_of_pieces_and_tiles(
    m: int, n: int, ranks: Sequence[int], dtype: torch.dtype, rng: torch.Generator
) -> None:
    aligned = m == 256
    check_unscaled(
        random_bucket(rng, ranks=ranks, modules=1, m=m, n=n, aligned=aligned, padding=2), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(30, 2051), (257, 16)])
def test_scaled_rows_keep_the_promise_of_their_dtype(
    m: int, n: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """Only A is scaled; the sums are of the rows before."""
    bucket = random_bucket(rng, ranks=[5, 1, 12], modules=1, m=m, n=n, padding=3)
    scale = torch.tensor([0.3, -1.7, 0.0], dtype=torch.float64)
    A, Bt, _, sums = stack(bucket, dtype, scale)
    a, bt = bucket.slabs(scale.tolist())
    torch.testing.assert_close(A.double(), a, rtol=ROUNDING[dtype], atol=2.0**-24)
    torch.testing.assert_close(Bt, bt.float().to(dtype), rtol=0, atol=0)
    unscaled, _ = bucket.slabs()
    expected = torch.stack([unscaled.square().sum(2), bt.square().sum(2)])
    torch.testing.assert_close(sums, expected, rtol=1e-13, atol=0)


def test_non_finite_entries_are_counted_by_slot_and_factor(rng: torch.Generator) -> None:
    bad = (float("nan"), float("inf"), float("-inf"))
    writer, slots, expected, row = FlatWriter(), [], [], 0
    for dtype, count_a, count_b in [
        (torch.float32, 3, 0),
        (torch.bfloat16, 0, 7),
        (torch.float16, 1, 250),
        (torch.float32, 0, 0),
    ]:
        a, b = normal(rng, 5, 90, dtype=dtype), normal(rng, 140, 5, dtype=dtype)
        # The extremes of the finite range are no error.
        a[0, 0], b[0, 0] = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2
        for factor, count in ((a, count_a), (b, count_b)):
            chosen = torch.randperm(factor.numel() - 1, generator=rng)[:count] + 1
            factor.view(-1)[chosen] = torch.tensor(bad).to(dtype).repeat(count)[:count]
        offsets = writer.add(a, 1), writer.add(b, 2)
        slots.append([0, row, 5, 0, offsets[0], CODES[dtype], 0, offsets[1], CODES[dtype]])
        expected.append([count_a, count_b])
        row += 5
    bucket = Bucket(1, 20, 140, 90, [writer.flat()], torch.tensor(slots), [])
    _, _, nonfinite, sums = stack(bucket, torch.float32)
    assert nonfinite.tolist() == expected
    finite = sums.isfinite().view(2, 4, 5).all(2)
    assert finite.tolist() == [[not a for a, _ in expected], [not b for _, b in expected]]


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(source: torch.dtype, target: torch.dtype) -> None:
    """Subnormals, infinities and NaN too, and overflow in the target, as torch's own cast has it."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(source)
    a, b = patterns.view(128, 512), patterns.view(512, 128)
    writer = FlatWriter()
    offsets = writer.add(a, 1), writer.add(b, 1)
    slots = torch.tensor([[0, 0, 128, 0, offsets[0], CODES[source], 0, offsets[1], CODES[source]]])
    A, Bt = (torch.empty(1, 128, 512, dtype=target) for _ in range(2))
    nonfinite, _ = stack_into(A, Bt, [writer.flat()], slots)
    count = int((~patterns.isfinite()).sum())
    assert nonfinite.tolist() == [[count, count]]
    for found, factor in ((A[0], a), (Bt[0], b.mT)):
        expected = factor.float().to(target)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0.0, 1e30, -1e30), expected.nan_to_num(0.0, 1e30, -1e30))
        assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~found.isnan())


@pytest.mark.parametrize("n", [131, 136])
def test_a_module_has_the_same_bits_alone_and_in_a_bucket(n: int, rng: torch.Generator) -> None:
    bucket = random_bucket(rng, ranks=[5, 16, 33], modules=3, m=77, n=n)
    A, Bt, _, sums = stack(bucket, torch.bfloat16)
    for module in range(3):
        slots = bucket.slots[bucket.slots[:, 0] == module].clone()
        slots[:, 0] = 0
        alone = Bucket(1, bucket.rows, bucket.m, bucket.n, bucket.flats, slots, [])
        a, bt, _, sums_alone = stack(alone, torch.bfloat16)
        assert torch.equal(a[0], A[module])
        assert torch.equal(bt[0], Bt[module])
        assert torch.equal(sums_alone[:, 0], sums[:, module])


def test_slabs_at_any_element(rng: torch.Generator) -> None:
    """A view of someone else's memory need not be aligned, and what lies around it is kept."""
    bucket = random_bucket(rng, ranks=[4, 9], modules=2, m=24, n=40)
    expected = stack(bucket, torch.bfloat16)
    around = [torch.full((2 * 13 * size + 2,), 5, dtype=torch.bfloat16) for size in (40, 24)]
    A, Bt = around[0][1:-1].view(2, 13, 40), around[1][1:-1].view(2, 13, 24)
    nonfinite, sums = stack_into(A, Bt, bucket.flats, bucket.slots)
    assert torch.equal(A, expected[0])
    assert torch.equal(Bt, expected[1])
    torch.testing.assert_close(sums, expected[3], rtol=1e-14, atol=0)
    assert not nonfinite.any()
    assert all(float(flat[0]) == float(flat[-1]) == 5 for flat in around)


def test_more_buffers_than_one_launch_has_room_for(rng: torch.Generator) -> None:
    bucket = random_bucket(rng, ranks=[1, 2] * 250, modules=1, m=3, n=5)
    A, Bt = torch.empty(1, bucket.rows, 5), torch.empty(1, bucket.rows, 3)
    # Factors from both ends of the list in one slot.
    slots = bucket.slots.clone()
    slots[0, 6], slots[0, 7:] = slots[-2, 6], slots[-2, 7:]
    nonfinite, _ = stack_into(A, Bt, bucket.flats, slots)
    a, bt = bucket.slabs()
    bt[0, :1] = bucket.factors[-2][3].double().mT
    assert torch.equal(A.double(), a)
    assert torch.equal(Bt.double(), bt)
    assert not nonfinite.any()


def test_no_buffers_at_all() -> None:
    A = torch.full((2, 3, 5), torch.nan, dtype=torch.float16)
    Bt = torch.full((2, 3, 4), torch.nan, dtype=torch.float16)
    nonfinite, sums = stack_into(A, Bt, [], torch.empty(0, 9, dtype=torch.int64))
    assert not (A.any() or Bt.any() or sums.any())
    assert nonfinite.shape == (0, 2)


GOOD = (0, 1, 2, 0, 0, 0, 0, 40, 0)  # two modules of four rows, rank 2, m = 3, n = 5, in 64 bytes

IMPOSSIBLE = [
    (2, *GOOD[1:]),
    (-1, *GOOD[1:]),
    (2**62, *GOOD[1:]),
    (0, 3, *GOOD[2:]),
    (0, -1, *GOOD[2:]),
    (0, 2**62, 2**62, *GOOD[3:]),
    (0, 1, -1, *GOOD[3:]),
    (*GOOD[:3], 1, *GOOD[4:]),
    (*GOOD[:3], -1, *GOOD[4:]),
    (*GOOD[:6], 2**62, *GOOD[7:]),
    (*GOOD[:4], 25, *GOOD[5:]),
    (*GOOD[:4], -4, *GOOD[5:]),
    (*GOOD[:4], 2**63 - 1, *GOOD[5:]),
    (*GOOD[:5], 3, *GOOD[6:]),
    (*GOOD[:7], 41, 0),
    (*GOOD[:8], -1),
    (*GOOD[:8], -(2**63)),
]


@pytest.mark.parametrize("row", IMPOSSIBLE)
def test_an_impossible_slot_is_neither_read_nor_written(row: tuple[int, ...]) -> None:
    flat = torch.arange(1, 17, dtype=torch.float32)
    other = (1, 2, 2, 0, 0, 0, 0, 40, 0)
    A, Bt = torch.full((2, 4, 5), torch.nan), torch.full((2, 4, 3), torch.nan)
    nonfinite, sums = stack_into(A, Bt, [flat], torch.tensor([row, other]))
    assert nonfinite.tolist() == [[-1, -1], [0, 0]]
    assert torch.equal(A[1, 2:], flat[:10].view(2, 5))
    assert torch.equal(Bt[1, 2:], flat[10:].view(3, 2).mT)
    assert not (A[0].any() or A[1, :2].any() or Bt[0].any() or Bt[1, :2].any())
    assert not (sums[:, 0].any() or sums[:, 1, :2].any())


def test_of_slots_that_claim_a_row_the_last_is_stacked() -> None:
    flat = torch.arange(1, 17, dtype=torch.float32)
    slots = torch.tensor([(0, 0, *GOOD[2:]), (0, 1, *GOOD[2:]), (0, 3, 1, *GOOD[3:])])
    bucket = Bucket(1, 4, 3, 5, [flat], slots, [])
    A, Bt, nonfinite, _ = stack(bucket, torch.float32)
    assert nonfinite.tolist() == [[-1, -1], [0, 0], [0, 0]]
    assert A[0].any(1).tolist() == [False, True, True, True]
    assert torch.equal(A[0, 1:3], flat[:10].view(2, 5))
    assert torch.equal(Bt[0, 3], flat[10:13])


edges = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**k + d for k in (31, 32, 61, 62, 63) for d in (-2, -1, 0, 1)]),
    st.integers(-(2**63), 2**63 - 1),
).filter(lambda value: value < 2**63)


@settings(max_examples=500, deadline=None)
@given(edges, edges, st.integers(0, 2**40), st.integers(-2, 4), st.integers(-1, 2**50))
def test_a_range_inside_a_buffer_by_unbounded_integers(
    offset: int, rows: int, cols: int, code: int, size: int
) -> None:
    found = library().simt_lies_within
    found.restype = ctypes.c_bool
    element = {0: 4, 1: 2, 2: 2}.get(code, 0)
    inside = element > 0 and 0 <= offset <= size and rows >= 0
    assert found(*int64(offset, rows, cols, code, size)) == (
        inside and offset + rows * cols * element <= size
    )


def test_any_table_at_all(rng: torch.Generator) -> None:
    """Nothing outside of the buffers is read, and nothing outside of the slabs is written."""
    buffer = torch.full((256,), 0x3C, dtype=torch.uint8)
    inside = buffer[:4].view(torch.float32), *[buffer[:2].view(dtype).float() for dtype in DTYPES[1:]]
    choices = torch.tensor([-(2**63), -1, 0, 1, 2, 3, 4, 60, 63, 64, 250, 2**31, 2**62, 2**63 - 1])
    slots = choices[torch.randint(len(choices), (300, 9), generator=rng)]
    slots[::2, [0, 3, 5, 6, 8]] = 0
    guarded = torch.full((4, 4, 9), 7.0)
    A, Bt = guarded[1:2], guarded[2:3]
    nonfinite, _ = stack_into(A, Bt, [buffer], slots)
    assert (guarded[0] == 7).all() and (guarded[3] == 7).all()
    assert set(nonfinite.unique().tolist()) <= {-1, 0}
    assert set(guarded[1:3].unique().tolist()) <= {0.0, *[float(value) for value in inside]}


def test_modules_that_no_client_has(rng: torch.Generator) -> None:
    bucket = random_bucket(rng, ranks=[3], modules=2, m=10, n=10, lacking=1.0, padding=2)
    assert not any(bool(found.any()) for found in stack(bucket, torch.float16))
