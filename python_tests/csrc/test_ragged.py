"""csrc/ragged alone, under AddressSanitizer and UndefinedBehaviorSanitizer, against torch and papers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sanitized import ADDRESS, HERE, build, run


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ragged")
    return build(folder, "ragged", [HERE / "ragged.cpp"], ADDRESS)


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit; of a NaN only that it is one."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan], expected[~nan])
    assert np.array_equal(np.signbit(found[~nan]), np.signbit(expected[~nan]))


def test_every_half_and_bfloat16_widens_as_torch_has_it(program: Path) -> None:
    halves, bfloats = np.frombuffer(run(program, "widen"), np.float32).reshape(2, 65536)
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).roll(2**15)
    assert patterns[1] == 1
    same_bits(halves, patterns.view(torch.float16).float().numpy())
    same_bits(bfloats, patterns.view(torch.bfloat16).float().numpy())


def floats_to_narrow(rng: torch.Generator) -> torch.Tensor:
    """Random bit patterns, and for every half and bfloat16 the floats around the ties beside it."""
    raw = torch.randint(-(2**31), 2**31, (200_000,), generator=rng).to(torch.int32)
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    around = []
    for dtype, tie in ((torch.float16, 2**12), (torch.bfloat16, 2**15)):
        exact = patterns.view(dtype).float().view(torch.int32)
        around += [exact + step for step in (0, 1, tie - 1, tie, tie + 1)]
    # Half's subnormals: ties between multiples of 2^-24, and what rounds to zero.
    steps = torch.arange(0, 2**11 + 2).double()
    subnormal = torch.cat([(steps + part) * 2.0**-24 for part in (0, 0.25, 0.5, 0.75)]).float()
    beside = subnormal.view(torch.int32)
    near = torch.cat([beside, beside + 1, beside - 1]).view(torch.float32)
    limits = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.39e38, 3.4028235e38, 1e-45])
    values = torch.cat([torch.cat([raw, *around]).view(torch.float32), near, limits])
    return torch.cat([values, -values])


def test_any_float_narrows_as_torch_has_it(program: Path, rng: torch.Generator) -> None:
    values = floats_to_narrow(rng)
    found = torch.frombuffer(
        bytearray(run(program, "narrow", stdin=values.numpy().tobytes())), dtype=torch.int16
    ).view(2, -1)
    for bits, dtype in zip(found, (torch.float16, torch.bfloat16), strict=True):
        same_bits(bits.view(dtype).float().numpy(), values.to(dtype).float().numpy())


# Random123 1.14, tests/kat_vectors: counter, key and result of philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_philox_gives_the_published_known_answers(program: Path) -> None:
    rows = []
    for counter, key, _ in KNOWN_ANSWERS:
        c, k = words(counter), words(key)
        rows.append([k[0] | k[1] << 32, c[0] | c[1] << 32, c[2] | c[3] << 32])
    found = run(program, "philox", stdin=np.array(rows, np.uint64).tobytes())
    expected = [words(result) for _, _, result in KNOWN_ANSWERS]
    assert np.frombuffer(found, np.uint32).reshape(-1, 4).tolist() == expected


def test_signs_are_the_bits_of_their_block_and_fair(program: Path) -> None:
    rows = np.array([[7, 3, block] for block in range(500)], np.uint64)
    signs = np.frombuffer(run(program, "signs", stdin=rows.tobytes()), np.float32)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    # philox(key = seed, counter = (block, stream)): block and stream are not interchangeable.
    counters = rows[:, [0, 2, 1]].copy()
    blocks = np.frombuffer(run(program, "philox", stdin=counters.tobytes()), np.uint32)
    bits = (blocks[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.array_equal(signs, bits.reshape(-1) * 2.0 - 1.0)
    assert abs(signs.mean()) < 5 / len(signs) ** 0.5
    lines = signs.reshape(-1, 128)
    assert np.abs(lines.T @ lines / len(lines) - np.eye(128)).max() < 6 / len(lines) ** 0.5


def test_the_balance_is_exact_and_even(program: Path, rng: torch.Generator) -> None:
    """c b a^T = (beta b)(alpha a)^T, beta a power of two, both sides equally long within two."""
    exponents = torch.randint(-120, 121, (20_000, 3), generator=rng).double()
    values = (torch.rand(20_000, 3, generator=rng, dtype=torch.float64) + 0.5) * 2.0**exponents
    values[:, 0] *= torch.randint(0, 2, (20_000,), generator=rng) * 2 - 1
    zeros = values[:3].clone()
    zeros.fill_diagonal_(0)
    rows = torch.cat([values, zeros, torch.tensor([[1.0, 2.0**-149, 2.0**127]]).double()]).numpy()
    found = np.frombuffer(run(program, "balance", stdin=rows.tobytes()), np.float64).reshape(-1, 3)
    alpha, beta, unit = found.T
    c, norm_a, norm_b = rows.T
    vanishing = (rows == 0).any(1)
    assert (alpha[vanishing] == 0).all()
    assert (beta[vanishing] == 0).all()
    live = ~vanishing
    assert np.array_equal(alpha[live] * beta[live], c[live])
    assert (np.frexp(beta[live])[0] == 0.5).all()
    ratio = np.abs(alpha[live]) * norm_a[live] / (beta[live] * norm_b[live])
    assert ratio.min() >= 0.499
    assert ratio.max() <= 2.001
    # The unit scale is an fp32 power of two that brings a norm near one, as far as fp32 reaches.
    assert (unit[norm_a == 0] == 0).all()
    scaled = unit[norm_a > 0] * norm_a[norm_a > 0]
    reached = norm_a[norm_a > 0] >= 2.0**-126
    assert scaled[reached].min() >= 0.7
    assert scaled[reached].max() <= 1.42
    assert np.array_equal(unit.astype(np.float32).astype(np.float64), unit)


def test_sizes_of_elements_and_table_rows(program: Path) -> None:
    assert np.frombuffer(run(program, "sizes"), np.int64).tolist() == [4, 2, 2, 8, 24, 72, 56]
