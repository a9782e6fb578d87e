"""ops.redistribute and redistribute_ against A = Vt[:r], B = U[:, :r] S[:r] / s in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import CODES, DTYPES, bytes_of, integer, normal
from torch import Tensor

from fastagg import ops

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


def check_slot(
    flat: Tensor, slot: list[int], scaling: float, U: Tensor, S: Tensor, Vt: Tensor
) -> None:
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


@settings(max_examples=60)
@given(
    modules=st.integers(1, 3),
    m=st.integers(0, 20),
    n=st.integers(0, 20),
    r=st.integers(0, 12),
    ranks=st.lists(st.integers(0, 20), max_size=6),
    seed=st.integers(0, 2**31),
)
def test_every_client_gets_its_factors(
    modules: int, m: int, n: int, r: int, ranks: list[int], seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    U, S, Vt = decomposition(rng, modules, m, n, r)
    slots, sizes, scalings = [], [], []
    for flat, rank in enumerate(ranks):
        a_dtype, b_dtype = DTYPES[integer(rng, 0, 2)], DTYPES[integer(rng, 0, 2)]
        a_offset = integer(rng, 0, 5)
        b_offset = a_offset + rank * n * a_dtype.itemsize + integer(rng, 0, 5)
        module = integer(rng, 0, modules - 1)
        slots.append([module, rank, flat, a_offset, CODES[a_dtype], b_offset, CODES[b_dtype]])
        sizes.append(b_offset + m * rank * b_dtype.itemsize + integer(rng, 0, 5))
        scalings.append(float(torch.randn((), generator=rng)) or 1.0)
    table = torch.tensor(slots, dtype=torch.int64).reshape(-1, 7)
    factors = torch.tensor(scalings, dtype=torch.float64)
    flats = ops.redistribute(U, S, Vt, table, factors, sizes=sizes)
    assert [flat.numel() for flat in flats] == sizes
    for flat, slot, scaling in zip(flats, slots, scalings, strict=True):
        assert flat.dtype == torch.uint8
        check_slot(flat, slot, scaling, U, S, Vt)

    # In place, what lies between the tensors stays as it was; fresh buffers are zero there.
    existing = [torch.full((size,), 0xA5, dtype=torch.uint8) for size in sizes]
    ops.redistribute_(existing, U, S, Vt, table, factors)
    for found, fresh, slot in zip(existing, flats, slots, strict=True):
        written = torch.zeros(found.numel(), dtype=torch.bool)
        for offset, count, code in ((slot[3], slot[1] * n, slot[4]), (slot[5], m * slot[1], slot[6])):
            written[offset : offset + count * DTYPES[code].itemsize] = True
        assert torch.equal(found[written], fresh[written])
        assert (found[~written] == 0xA5).all()
        assert not fresh[~written].any()


def test_many_modules_and_clients_share_buffers(rng: torch.Generator) -> None:
    """Sizes beyond the kernel's tasks; each client's buffer holds a slot of every module."""
    modules, m, n, r = 3, 1100, 70, 40
    U, S, Vt = decomposition(rng, modules, m, n, r)
    slots, sizes = [], []
    for flat, (rank, dtype) in enumerate([(64, torch.float32), (17, torch.bfloat16)]):
        offset = 3
        for module in range(modules):
            b_offset = offset + rank * n * dtype.itemsize
            slots.append([module, rank, flat, offset, CODES[dtype], b_offset, CODES[dtype]])
            offset = b_offset + m * rank * dtype.itemsize + 1
        sizes.append(offset)
    scalings = torch.rand(len(slots), generator=rng, dtype=torch.float64) + 0.5
    flats = ops.redistribute(U, S, Vt, torch.tensor(slots), scalings, sizes=sizes)
    for slot, scaling in zip(slots, scalings.tolist(), strict=True):
        check_slot(flats[slot[2]], slot, scaling, U, S, Vt)
    strided = [t.mT.contiguous().mT for t in (U, S, Vt)]
    again = ops.redistribute(
        *strided, torch.tensor(slots).t().contiguous().t(), scalings, sizes=sizes
    )
    assert all(torch.equal(a, b) for a, b in zip(again, flats, strict=True))


def test_every_scaling_gives_back_the_same_update(rng: torch.Generator) -> None:
    """s_k B_k A_k is the truncated dW for every client, whatever its own scaling."""
    U, S, Vt = decomposition(rng, 1, 30, 20, 8)
    expected = (U[0].double() * S[0].double()) @ Vt[0].double()
    for scaling in (2.0, 0.125, 16 / 3, -1.0):
        slots = torch.tensor([[0, 8, 0, 0, 0, 640, 0]])
        factors = torch.tensor([scaling], dtype=torch.float64)
        (flat,) = ops.redistribute(U, S, Vt, slots, factors, sizes=[640 + 960])
        a, b = read(flat, 0, (8, 20), torch.float32), read(flat, 640, (30, 8), torch.float32)
        torch.testing.assert_close(scaling * (b.double() @ a.double()), expected, rtol=0, atol=1e-5)


def test_into_a_mapped_file(rng: torch.Generator, tmp_path: Path) -> None:
    U, S, Vt = decomposition(rng, 1, 6, 5, 4)
    path = tmp_path / "flat"
    path.write_bytes(bytes(200))
    mapped = torch.from_file(str(path), shared=True, size=200, dtype=torch.uint8)
    slots = torch.tensor([[0, 3, 0, 7, 0, 80, 1]])
    ops.redistribute_([mapped], U, S, Vt, slots, torch.ones(1, dtype=torch.float64))
    (expected,) = ops.redistribute(
        U, S, Vt, slots, torch.ones(1, dtype=torch.float64), sizes=[200]
    )
    assert path.read_bytes() == bytes(expected.tolist())


def test_offsets_beyond_two_gibibytes(rng: torch.Generator, huge_flat: Tensor) -> None:
    U, S, Vt = decomposition(rng, 1, 6, 5, 4)
    offset = 2**31 + 2**20 + 1
    slots = torch.tensor([[0, 4, 0, offset, 0, offset + 100, 2]])
    ops.redistribute_([huge_flat], U, S, Vt, slots, torch.ones(1, dtype=torch.float64))
    check_slot(huge_flat, slots[0].tolist(), 1.0, U, S, Vt)


def test_nothing_to_hand_out(rng: torch.Generator) -> None:
    U, S, Vt = decomposition(rng, 1, 6, 5, 4)
    empty = torch.empty(0, 7, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    assert ops.redistribute(U, S, Vt, *empty, sizes=[]) == []
    (flat,) = ops.redistribute(U, S, Vt, *empty, sizes=[5])
    assert torch.equal(flat, torch.zeros(5, dtype=torch.uint8))
    ops.redistribute_([], U, S, Vt, *empty)
    nothing = torch.zeros(1, 0, 4), torch.zeros(1, 4), torch.zeros(1, 4, 0)
    slots = torch.tensor([[0, 2**62, 0, 0, 0, 0, 0]])
    (flat,) = ops.redistribute(*nothing, slots, torch.ones(1, dtype=torch.float64), sizes=[0])
    assert flat.numel() == 0


GOOD = (0, 2, 0, 0, 0, 40, 0)  # rank 2 of (6, 5): A in 40 bytes, B in 48


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots": GOOD[:6]}, ["'slots'", "(rows, 7)", "(1, 6)"]),
        ({"slots": (1, *GOOD[1:])}, ["'slots'", "row 0", "module below 1", "got 1"]),
        ({"slots": (-1, *GOOD[1:])}, ["'slots'", "module", "got -1"]),
        ({"slots": (0, -1, *GOOD[2:])}, ["'slots'", "rank of at least 0", "got -1"]),
        ({"slots": (0, 3, *GOOD[2:])}, ["'slots'", "B", "96 bytes", "3 x 6"]),
        ({"slots": (0, 2**62, *GOOD[2:])}, ["'slots'", "A", "96 bytes", "x 5"]),
        ({"slots": (0, 2, 1, *GOOD[3:])}, ["'slots'", "buffer below 1", "got 1"]),
        ({"slots": (*GOOD[:3], 57, *GOOD[4:])}, ["'slots'", "A", "byte 57"]),
        ({"slots": (*GOOD[:3], -1, *GOOD[4:])}, ["'slots'", "A", "byte -1"]),
        ({"slots": (*GOOD[:4], 3, *GOOD[5:])}, ["'slots'", "A", "dtype code", "got 3"]),
        ({"slots": (*GOOD[:5], 49, 0)}, ["'slots'", "B", "byte 49"]),
        ({"scalings": torch.ones(2).double()}, ["'scalings'", "(1)", "(2)"]),
        ({"scalings": torch.ones(1)}, ["'scalings'", "Double", "Float"]),
        ({"scalings": torch.zeros(1).double()}, ["'scalings'", "finite scaling other than 0"]),
        ({"scalings": torch.full((1,), torch.nan).double()}, ["'scalings'", "nan"]),
        ({"U": torch.zeros(6, 4)}, ["'U'", "(6, 4)"]),
        ({"U": torch.zeros(1, 6, 4).double()}, ["'U'", "Float", "Double"]),
        ({"S": torch.zeros(1, 3)}, ["'S'", "(1, 4)", "(1, 3)"]),
        ({"Vt": torch.zeros(1, 3, 5)}, ["'Vt'", "(1, 4, 5)", "(1, 3, 5)"]),
        ({"Vt": torch.zeros(4, 5)}, ["'Vt'", "(4, 5)"]),
        ({"flat": torch.zeros(96, 2, dtype=torch.uint8)[:, 0]}, ["'flats'", "contiguous"]),
    ],
)
def test_argument_errors(changes: dict[str, Any], words: list[str]) -> None:
    given = {
        "U": torch.ones(1, 6, 4),
        "S": torch.ones(1, 4),
        "Vt": torch.ones(1, 4, 5),
        "scalings": torch.ones(1, dtype=torch.float64),
        "flat": torch.full((96,), 7, dtype=torch.uint8),
        **changes,
    }
    table = torch.tensor([given.pop("slots", GOOD)])
    flat = given.pop("flat")
    before = flat.clone()
    call = (given["U"], given["S"], given["Vt"], table, given["scalings"])
    with pytest.raises(RuntimeError, match=r"fastagg::redistribute_: argument") as caught:
        ops.redistribute_([flat], *call)
    assert all(word in str(caught.value) for word in words)
    assert torch.equal(flat, before)
    if "flat" not in changes:
        with pytest.raises(RuntimeError, match=r"fastagg::redistribute: argument"):
            ops.redistribute(*call, sizes=[96])


def test_a_bad_slot_after_a_good_one_writes_nothing() -> None:
    flat = torch.full((96,), 7, dtype=torch.uint8)
    table = torch.tensor([GOOD, (0, 2, 0, 90, 0, 0, 0)])
    with pytest.raises(RuntimeError, match=r"'slots': row 1, A"):
        ops.redistribute_(
            [flat],
            torch.ones(1, 6, 4),
            torch.ones(1, 4),
            torch.ones(1, 4, 5),
            table,
            torch.ones(2, dtype=torch.float64),
        )
    assert (flat == 7).all()


def test_a_negative_size() -> None:
    empty = torch.empty(0, 7, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"'sizes': expected sizes of at least 0 bytes, got -3"):
        ops.redistribute(
            torch.ones(1, 6, 4), torch.ones(1, 4), torch.ones(1, 4, 5), *empty, sizes=[4, -3]
        )


def test_bytes_are_the_casts_of_torch(rng: torch.Generator) -> None:
    """Rounding to bf16 and fp16, subnormals and overflow as torch's own casts have them."""
    exponents = torch.randint(-30, 20, (4, 500), generator=rng)
    Vt = torch.ldexp(normal(rng, 4, 500), exponents)[None]
    for dtype in DTYPES:
        slots = torch.tensor([[0, 4, 0, 1, CODES[dtype], 0, 0]])
        (flat,) = ops.redistribute(
            torch.zeros(1, 0, 4),
            torch.zeros(1, 4),
            Vt,
            slots,
            torch.ones(1, dtype=torch.float64),
            sizes=[1 + 2000 * dtype.itemsize],
        )
        assert torch.equal(flat[1:], bytes_of(Vt.to(dtype)))
