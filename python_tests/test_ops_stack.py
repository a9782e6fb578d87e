"""ops.stack against the clients' own factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import CODES, DTYPES, FlatWriter, bytes_of, normal, random_bucket

from fastagg import ops

GOOD = (0, 0, 2, 0, 0, 0, 0, 40, 0)  # two modules of rank 2, m = 3, n = 5, in 64 bytes

# A product w s A is rounded to fp32, and then to the slab's dtype.
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@settings(max_examples=60)
@given(
    ranks=st.lists(st.integers(0, 35), max_size=5),
    modules=st.integers(0, 3),
    m=st.integers(0, 40),
    n=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    lacking=st.sampled_from([0.0, 0.5]),
    padding=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
def test_unscaled_rows_are_the_factors_to_the_bit(
    ranks: list[int], dtype: torch.dtype, seed: int, **shape: Any
) -> None:
    bucket = random_bucket(torch.Generator().manual_seed(seed), ranks=ranks, **shape)
    A, Bt, nonfinite, sums = ops.stack(bucket.flats, bucket.slots, dtype=dtype, **bucket.sizes())
    a, bt = bucket.slabs()
    # float64 holds every factor exactly, so that one rounding is torch's own cast of the factor.
    torch.testing.assert_close(A, a.float().to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(Bt, bt.float().to(dtype), rtol=0, atol=0)
    assert not nonfinite.any()
    expected = torch.stack([a.square().sum(2), bt.square().sum(2)])
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(300, 2051), (2049, 257), (4100, 17)])
def test_scaled_rows_keep_the_promise_of_their_dtype(
    m: int, n: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """Sizes on both sides of the kernel's blocks; the sums are of the rows before scaling."""
    bucket = random_bucket(rng, ranks=[17, 1, 64], modules=1, m=m, n=n, padding=3)
    scale = torch.tensor([0.3, -1.7, 0.0], dtype=torch.float64)
    A, Bt, _, sums = ops.stack(bucket.flats, bucket.slots, scale, dtype=dtype, **bucket.sizes())
    a, bt = bucket.slabs(scale.tolist())
    torch.testing.assert_close(A.double(), a, rtol=ROUNDING[dtype], atol=2.0**-24)
    torch.testing.assert_close(Bt, bt.float().to(dtype), rtol=0, atol=0)
    unscaled, _ = bucket.slabs()
    expected = torch.stack([unscaled.square().sum(2), bt.square().sum(2)])
    torch.testing.assert_close(sums, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(17024, 17024), (17003, 17055)])
@pytest.mark.parametrize("first", [0, 3])
def test_slabs_that_are_written_past_the_caches(
    first: int, m: int, n: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """More than 8 MiB, rows at and off the lines of the memory, ranks of every kind of tile: the bits
    are those of one thread, and of slabs at any address."""
    bucket = random_bucket(rng, ranks=[64, 19, 16, 9, 8, 5, 4, 3, 1], modules=1, m=m, n=n, padding=2)
    A, Bt = (
        torch.full((first + bucket.rows * size,), torch.nan, dtype=dtype)[first:].view(1, -1, size)
        for size in (n, m)
    )
    scale = torch.tensor([0.3, -1.7, 0.0, 1.0, 2.0, 0.1, 3.0, 5.0, 7.0], dtype=torch.float64)
    for scales in (None, scale):
        _, sums = ops.stack_(A, Bt, bucket.flats, bucket.slots, scales)
        a, bt = bucket.slabs(None if scales is None else scales.tolist())
        if scales is None:
            torch.testing.assert_close(A, a.float().to(dtype), rtol=0, atol=0)
        torch.testing.assert_close(A.double(), a, rtol=ROUNDING[dtype], atol=2.0**-24)
        torch.testing.assert_close(Bt, bt.float().to(dtype), rtol=0, atol=0)
        unscaled, _ = bucket.slabs()
        expected = torch.stack([unscaled.square().sum(2), bt.square().sum(2)])
        torch.testing.assert_close(sums, expected, rtol=1e-13, atol=0)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = ops.stack(bucket.flats, bucket.slots, scales, dtype=dtype, **bucket.sizes())
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip((A, Bt), alone[:2], strict=True))
        assert torch.equal(sums, alone[3])


def test_padding_rows_are_zero_in_memory_that_held_something_else(rng: torch.Generator) -> None:
    for _ in range(8):
        dirty = [torch.full((3, 24, 100), float("nan")) for _ in range(4)]
        del dirty
        bucket = random_bucket(rng, ranks=[3, 5], modules=3, m=100, n=100, lacking=0.5)
        sizes = {**bucket.sizes(), "rows": 24}
        A, Bt, _, sums = ops.stack(bucket.flats, bucket.slots, dtype=torch.float32, **sizes)
        used = torch.zeros(3, 24, dtype=torch.bool)
        for module, row, a, _ in bucket.factors:
            used[module, row : row + a.shape[0]] = True
        for slab in (A, Bt):
            assert torch.equal(slab[~used], torch.zeros_like(slab[~used]))
        assert not sums[:, ~used].any()


def test_non_finite_entries_are_counted_by_slot_and_factor(rng: torch.Generator) -> None:
    bad = (float("nan"), float("inf"), float("-inf"))
    writer, slots, expected, row = FlatWriter(), [], [], 0
    for dtype, count_a, count_b in [
        (torch.float32, 3, 0),
        (torch.bfloat16, 0, 7),
        (torch.float16, 1, 2500),
        (torch.float32, 0, 0),
    ]:
        a, b = normal(rng, 5, 900, dtype=dtype), normal(rng, 2600, 5, dtype=dtype)
        # The extremes of the finite range are no error.
        a[0, 0], b[0, 0] = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2
        for factor, count in ((a, count_a), (b, count_b)):
            chosen = torch.randperm(factor.numel() - 1, generator=rng)[:count] + 1
            factor.view(-1)[chosen] = torch.tensor(bad).to(dtype).repeat(count)[:count]
        offsets = writer.add(a, 1), writer.add(b, 2)
        slots.append([0, row, 5, 0, offsets[0], CODES[dtype], 0, offsets[1], CODES[dtype]])
        expected.append([count_a, count_b])
        row += 5
    _, _, nonfinite, _ = ops.stack(
        [writer.flat()],
        torch.tensor(slots),
        modules=1,
        rows=20,
        m=2600,
        n=900,
        dtype=torch.float32,
    )
    assert nonfinite.tolist() == expected


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(source: torch.dtype, target: torch.dtype) -> None:
    """Subnormals, infinities and NaN too, and overflow in the target, as torch's own cast has it."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(source)
    a, b = patterns.view(128, 512), patterns.view(512, 128)
    writer = FlatWriter()
    offsets = writer.add(a, 1), writer.add(b, 1)
    slots = torch.tensor([[0, 0, 128, 0, offsets[0], CODES[source], 0, offsets[1], CODES[source]]])
    A, Bt, _, _ = ops.stack(
        [writer.flat()], slots, modules=1, rows=128, m=512, n=512, dtype=target
    )
    for found, factor in ((A[0], a), (Bt[0], b.mT)):
        expected = factor.float().to(target)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0.0, 1e30, -1e30), expected.nan_to_num(0.0, 1e30, -1e30))
        assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~found.isnan())


def test_any_layout_of_the_arguments(rng: torch.Generator) -> None:
    """Strided buffers and tables, and buffers typed as something else than bytes."""
    bucket = random_bucket(rng, ranks=[4, 7], modules=2, m=12, n=10)
    scale = torch.rand(4, generator=rng, dtype=torch.float64)
    expected = ops.stack(
        bucket.flats, bucket.slots, scale, dtype=torch.float32, **bucket.sizes()
    )
    strided = [torch.stack([flat, flat * 3], 1)[:, 0] for flat in bucket.flats]
    assert not strided[0].is_contiguous()
    table = bucket.slots.t().contiguous().t()
    wide = torch.stack([scale, scale], 1)[:, 0]
    found = ops.stack(strided, table, wide, dtype=torch.float32, **bucket.sizes())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    a, b = normal(rng, 3, 10), normal(rng, 12, 3, dtype=torch.bfloat16)
    slots = torch.tensor([[0, 0, 3, 0, 0, 0, 1, 0, 1]])
    typed = ops.stack([a, b], slots, modules=1, rows=3, m=12, n=10, dtype=torch.float32)
    assert torch.equal(typed[0][0], a)
    assert torch.equal(typed[1][0], b.float().mT)


def test_a_module_has_the_same_bits_alone_and_in_a_bucket(rng: torch.Generator) -> None:
    bucket = random_bucket(rng, ranks=[5, 16, 33], modules=3, m=77, n=131)
    A, Bt, _, sums = ops.stack(bucket.flats, bucket.slots, dtype=torch.bfloat16, **bucket.sizes())
    for module in range(3):
        slots = bucket.slots[bucket.slots[:, 0] == module].clone()
        slots[:, 0] = 0
        sizes = {**bucket.sizes(), "modules": 1}
        a, bt, _, alone = ops.stack(bucket.flats, slots, dtype=torch.bfloat16, **sizes)
        assert torch.equal(a[0], A[module])
        assert torch.equal(bt[0], Bt[module])
        assert torch.equal(alone[:, 0], sums[:, module])


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_slabs_that_held_something_else(dtype: torch.dtype, rng: torch.Generator) -> None:
    """stack_ is stack, whatever the slabs held: a loop over chunks reuses them."""
    for rows in (20, 50):
        bucket = random_bucket(rng, ranks=[7, 12], modules=3, m=300, n=77, lacking=0.4)
        scale = torch.rand(len(bucket.slots), generator=rng, dtype=torch.float64)
        sizes = {**bucket.sizes(), "rows": rows}
        expected = ops.stack(bucket.flats, bucket.slots, scale, dtype=dtype, **sizes)
        A = torch.full((3, rows, 77), torch.nan, dtype=dtype)
        Bt = torch.full((3, rows, 300), torch.inf, dtype=dtype)
        returned = ops.stack_(A, Bt, bucket.flats, bucket.slots, scale)
        assert all(
            torch.equal(x, y) for x, y in zip((A, Bt, *returned), expected, strict=True)
        )
    ops.stack_(A, Bt, [], torch.empty(0, 9, dtype=torch.int64))
    assert not (A.any() or Bt.any())


@pytest.mark.parametrize(
    ("A", "Bt", "words"),
    [
        (torch.ones(4, 5), torch.ones(2, 4, 3), ["'A'", "three dimensions"]),
        (torch.ones(2, 4, 5).double(), torch.ones(2, 4, 3), ["'A'", "Half", "Double"]),
        (torch.ones(2, 4, 5), torch.ones(2, 3, 3), ["'Bt'", "(2, 4, 5)", "(2, 3, 3)"]),
        (torch.ones(2, 4, 5), torch.ones(2, 4, 3).half(), ["'Bt'", "Float", "Half"]),
        (torch.ones(2, 5, 4).mT, torch.ones(2, 4, 3), ["'A'", "contiguous slab"]),
        (torch.ones(2, 4, 5), torch.ones(2, 3, 4).mT, ["'Bt'", "contiguous slab"]),
        (torch.ones(2, 4, 5), torch.ones(2, 4, 400), ["'slots'", "row 0, B", "64 bytes"]),
        (torch.ones(2, 1, 5), torch.ones(2, 1, 3), ["'slots'", "rows within 1"]),
    ],
)
def test_argument_errors_write_nothing(
    A: torch.Tensor, Bt: torch.Tensor, words: list[str]
) -> None:
    with pytest.raises(RuntimeError, match=r"fastagg::stack_: argument") as caught:
        ops.stack_(A, Bt, [torch.zeros(64, dtype=torch.uint8)], torch.tensor([GOOD]))
    assert all(word in str(caught.value) for word in words)
    assert (A == 1).all()
    assert (Bt == 1).all()


def test_offsets_beyond_two_gibibytes(rng: torch.Generator, huge_flat: torch.Tensor) -> None:
    a, b = normal(rng, 3, 65), normal(rng, 31, 3, dtype=torch.bfloat16)
    offsets = []
    for factor, offset in ((a, 2**31 + 5), (b, 2**31 + 2**27 + 1)):
        raw = bytes_of(factor)
        huge_flat[offset : offset + raw.numel()] = raw
        offsets.append(offset)
    slots = torch.tensor([[0, 0, 3, 0, offsets[0], 0, 0, offsets[1], 1]])
    A, Bt, _, _ = ops.stack([huge_flat], slots, modules=1, rows=3, m=31, n=65, dtype=torch.float32)
    assert torch.equal(A[0], a)
    assert torch.equal(Bt[0], b.float().mT)


def test_no_buffers_at_all() -> None:
    empty = torch.empty(0, 9, dtype=torch.int64)
    A, Bt, nonfinite, sums = ops.stack(
        [], empty, modules=2, rows=3, m=4, n=5, dtype=torch.float16
    )
    assert torch.equal(A, torch.zeros(2, 3, 5, dtype=torch.float16))
    assert torch.equal(Bt, torch.zeros(2, 3, 4, dtype=torch.float16))
    assert nonfinite.shape == (0, 2)
    assert torch.equal(sums, torch.zeros(2, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots": [(0, 0, 2)]}, ["slots", "(rows, 9)", "(1, 3)"]),
        ({"slots": [GOOD], "table": torch.int32}, ["slots", "Long", "Int"]),
        ({"slots": [(2, *GOOD[1:])]}, ["slots", "row 0", "module below 2", "got 2"]),
        ({"slots": [(-1, *GOOD[1:])]}, ["slots", "module", "got -1"]),
        ({"slots": [(0, 3, *GOOD[2:])]}, ["slots", "rows within 4", "rank 2 at row 3"]),
        ({"slots": [(0, 0, -1, *GOOD[3:])]}, ["slots", "rank -1"]),
        ({"slots": [(0, 2**62, 2**62, *GOOD[3:])]}, ["slots", "rows within 4"]),
        ({"slots": [GOOD, GOOD]}, ["slots", "row 1", "another slot"]),
        ({"slots": [(*GOOD[:3], 1, *GOOD[4:])]}, ["slots", "buffer below 1", "got 1"]),
        ({"slots": [(*GOOD[:4], 41, *GOOD[5:])]}, ["slots", "A", "64 bytes", "byte 41"]),
        ({"slots": [(*GOOD[:4], -4, *GOOD[5:])]}, ["slots", "A", "byte -4"]),
        ({"slots": [(*GOOD[:4], 2**63 - 1, *GOOD[5:])]}, ["slots", "A", "64 bytes"]),
        ({"slots": [(*GOOD[:5], 3, *GOOD[6:])]}, ["slots", "A", "dtype code", "got 3"]),
        ({"slots": [(*GOOD[:7], 41, 0)]}, ["slots", "B", "64 bytes", "byte 41"]),
        ({"slots": [(*GOOD[:8], -1)]}, ["slots", "B", "dtype code", "got -1"]),
        ({"modules": -1}, ["modules", "at least 0", "-1"]),
        ({"m": -2}, ["'m'", "at least 0", "-2"]),
        ({"rows": 2**40, "modules": 2**40}, ["rows", "2^63"]),
        ({"rows": 2**40, "n": 2**40}, ["rows", "2^63"]),
        ({"dtype": torch.float64}, ["dtype", "Half", "Double"]),
        ({"dtype": torch.int8}, ["dtype", "Half", "Char"]),
        ({"scale": torch.ones(2, dtype=torch.float64)}, ["scale", "(1)", "(2)"]),
        ({"scale": torch.ones(1)}, ["scale", "Double", "Float"]),
    ],
)
def test_argument_errors(changes: dict[str, Any], words: list[str]) -> None:
    call = {"modules": 2, "rows": 4, "m": 3, "n": 5, "dtype": torch.float32, **changes}
    table = torch.tensor(call.pop("slots", [GOOD]), dtype=call.pop("table", torch.int64))
    flat = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"fastagg::stack: argument") as caught:
        ops.stack([flat], table, call.pop("scale", None), **call)
    for word in words:
        assert word in str(caught.value)
