"""The hand-out kernel against A = Vt[:r], B = U[:, :r] S[:r] / s in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt.ragged import redistribute
from stacks import CODES, DTYPES, bytes_of, integer, normal
from torch import Tensor

# B is a product and a quotient, rounded to fp32 and then to its dtype.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def decomposition(
    rng: torch.Generator, modules: int, m: int, n: int, r: int
) -> tuple[Tensor, Tensor, Tensor]:
    S = torch.rand(modules, r, generator=rng).sort(1, descending=True)[0]
    return normal(rng, modules, m, r), S, normal(rng, modules, r, n)


def read(flat: Tensor, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    size = shape[0] * shape[1] * dtype.itemsize
    return flat[offset : offset + size].clone().view(dtype).view(shape)


def check_slot(flat: Tensor, slot: list[int], scaling: float, U: Tensor, S: Tensor, Vt: Tensor) -> None:
    module, rank, _, a_offset, a_code, b_offset, b_code = slot
    m, n, r = U.shape[1], Vt.shape[2], S.shape[1]
    a_dtype, b_dtype = DTYPES[a_code], DTYPES[b_code]
    a = torch.zeros(rank, n, dtype=torch.float64)
    b = torch.zeros(m, rank, dtype=torch.float64)
    kept = min(rank, r)
    a[:kept] = Vt[module, :kept].double()
    b[:, :kept] = U[module, :, :kept].double() * S[module, :kept].double() / scaling
    torch.testing.assert_close(
        read(flat, a_offset, (rank, n), a_dtype), a.float().to(a_dtype), rtol=0, atol=0
    )
    found = read(flat, b_offset, (m, rank), b_dtype).double()
    torch.testing.assert_close(found, b, rtol=ROUNDING[b_dtype], atol=1e-7)


def check_hand_out(
    rng: torch.Generator,
    shape: tuple[int, int, int, int],
    slots: list[list[int]],
    sizes: list[int],
) -> None:
    """Every slot holds its factors, and what lies between them is as it was."""
    U, S, Vt = decomposition(rng, *shape)
    table = torch.tensor(slots, dtype=torch.int64).reshape(-1, 7)
    scalings = torch.randn(len(slots), generator=rng, dtype=torch.float64)
    before = [torch.full((size,), 0xA5, dtype=torch.uint8) for size in sizes]
    flats = redistribute(before, U, S, Vt, table, scalings)
    outside = [torch.ones(size, dtype=torch.bool) for size in sizes]
    for slot, scaling in zip(slots, scalings.tolist(), strict=True):
        check_slot(flats[slot[2]], slot, scaling, U, S, Vt)
        for offset, count, code in (
            (slot[3], slot[1] * shape[2], slot[4]),
            (slot[5], slot[1] * shape[1], slot[6]),
        ):
            outside[slot[2]][offset : offset + count * DTYPES[code].itemsize] = False
    for flat, untouched in zip(flats, outside, strict=True):
        assert (flat[untouched] == 0xA5).all()


@settings(max_examples=60, deadline=None)
@given(
    modules=st.integers(1, 3),
    m=st.integers(0, 20),
    n=st.integers(0, 20),
    r=st.integers(0, 12),
    ranks=st.lists(st.integers(0, 20), max_size=5),
    seed=st.integers(0, 2**31),
)
def test_every_client_gets_its_factors(
    modules: int, m: int, n: int, r: int, ranks: list[int], seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    slots, sizes = [], []
    for flat, rank in enumerate(ranks):
        a_dtype, b_dtype = DTYPES[integer(rng, 0, 2)], DTYPES[integer(rng, 0, 2)]
        a_offset = integer(rng, 0, 5)
        b_offset = a_offset + rank * n * a_dtype.itemsize + integer(rng, 0, 5)
        module = integer(rng, 0, modules - 1)
        slots.append([module, rank, flat, a_offset, CODES[a_dtype], b_offset, CODES[b_dtype]])
        sizes.append(b_offset + m * rank * b_dtype.itemsize + integer(rng, 0, 5))
    check_hand_out(rng, (modules, m, n, r), slots, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [0, 8, 4, 2, 1])
def test_vectors_at_any_alignment(gap: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Ranks below, at and above the decomposition's, and rows that share a vector with the next."""
    modules, m, n, r = 1, 60, 40, 16
    slots, offset = [], 0
    for rank in (4, 16, 8, 7, 20):
        a_offset = offset + gap
        b_offset = a_offset + rank * n * dtype.itemsize + gap
        slots.append([0, rank, 0, a_offset, CODES[dtype], b_offset, CODES[dtype]])
        offset = b_offset + m * rank * dtype.itemsize
    check_hand_out(rng, (modules, m, n, r), slots, [offset + gap])


def test_more_than_a_block_and_several_modules(rng: torch.Generator) -> None:
    """Sizes beyond one block's threads; each client's buffer holds a slot of every module."""
    modules, m, n, r = 2, 1100, 70, 40
    slots, sizes = [], []
    for flat, (rank, dtype) in enumerate([(64, torch.float32), (17, torch.bfloat16)]):
        offset = 3
        for module in range(modules):
            b_offset = offset + rank * n * dtype.itemsize
            slots.append([module, rank, flat, offset, CODES[dtype], b_offset, CODES[dtype]])
            offset = b_offset + m * rank * dtype.itemsize + 1
        sizes.append(offset)
    check_hand_out(rng, (modules, m, n, r), slots, sizes)


def test_a_rank_beyond_the_factors_that_a_block_keeps(rng: torch.Generator) -> None:
    rank = 4096 + 7
    slots = [[0, rank, 0, 0, 0, 2 * 4 * rank, 0]]
    check_hand_out(rng, (1, 3, 2, rank), slots, [5 * 4 * rank])


def test_more_buffers_than_one_launch_has_room_for(rng: torch.Generator) -> None:
    slots = [[0, 2, flat, 1, 1, 21, 1] for flat in range(500)]
    check_hand_out(rng, (1, 3, 5, 4), slots, [33] * 500)


def test_the_bits_of_torch(rng: torch.Generator) -> None:
    """Rounding to bf16 and fp16, subnormals and overflow, for any scaling: the same operations in
    fp64 and fp32 have one right answer."""
    exponents = torch.randint(-30, 20, (4, 64), generator=rng)
    Vt = torch.ldexp(normal(rng, 4, 64), exponents)[None]
    U = torch.ldexp(normal(rng, 64, 4), exponents.T)[None]
    S = torch.rand(1, 4, generator=rng)
    for dtype in DTYPES:
        for scaling in (2.0, 16 / 3, -1e-3):
            slots = torch.tensor([[0, 4, 0, 1, CODES[dtype], 1 + 256 * dtype.itemsize, CODES[dtype]]])
            flat = torch.zeros(1 + 512 * dtype.itemsize, dtype=torch.uint8)
            scalings = torch.tensor([scaling], dtype=torch.float64)
            (found,) = redistribute([flat], U, S, Vt, slots, scalings)
            b = U * (S.double() / scaling).float()[:, None]
            expected = torch.cat([bytes_of(Vt.to(dtype)), bytes_of(b.to(dtype))])
            assert torch.equal(found[1:], expected)


GOOD = (0, 2, 0, 0, 0, 40, 0)  # rank 2 of (6, 5): A in 40 bytes, B in 48


@pytest.mark.parametrize(
    "row",
    [
        (1, *GOOD[1:]),
        (-1, *GOOD[1:]),
        (2**62, *GOOD[1:]),
        (0, -1, *GOOD[2:]),
        (0, 3, *GOOD[2:]),
        (0, 2**62, *GOOD[2:]),
        (0, 2, 1, *GOOD[3:]),
        (0, 2, -1, *GOOD[3:]),
        (0, 2, -(2**63), *GOOD[3:]),
        (0, 2, 2**63 - 1, *GOOD[3:]),
        (*GOOD[:3], 57, *GOOD[4:]),
        (*GOOD[:3], -1, *GOOD[4:]),
        (*GOOD[:4], 3, *GOOD[5:]),
        (*GOOD[:5], 49, 0),
        (*GOOD[:6], -1),
    ],
)
def test_an_impossible_slot_is_not_written(row: tuple[int, ...], rng: torch.Generator) -> None:
    U, S, Vt = decomposition(rng, 1, 6, 5, 4)
    flat = torch.full((96,), 7, dtype=torch.uint8)
    scalings = torch.ones(1, dtype=torch.float64)
    (found,) = redistribute([flat], U, S, Vt, torch.tensor([row]), scalings)
    assert (found == 7).all()


def test_nothing_to_hand_out(rng: torch.Generator) -> None:
    U, S, Vt = decomposition(rng, 1, 6, 5, 4)
    flat = torch.full((5,), 7, dtype=torch.uint8)
    nothing = torch.empty(0, 7, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    assert redistribute([], U, S, Vt, *nothing) == []
    (found,) = redistribute([flat], U, S, Vt, *nothing)
    assert torch.equal(found, flat)
    # Empty matrices may claim any rank.
    empty = torch.zeros(1, 0, 4), torch.zeros(1, 4), torch.zeros(1, 4, 0)
    slots = torch.tensor([[0, 2**62, 0, 0, 0, 0, 0]])
    (found,) = redistribute([flat], *empty, slots, torch.ones(1, dtype=torch.float64))
    assert torch.equal(found, flat)
