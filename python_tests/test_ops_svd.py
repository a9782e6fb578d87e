"""The SVD ops themselves: tables of statistics, streams, bits, edge sizes and argument errors.

How accurate they are is tested by test_linalg_hostile.py, through fastagg.truncated_svd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stacks import DTYPES, product, random_stack
from torch import Tensor

from fastagg import ops

Result = tuple[Tensor, Tensor, Tensor, Tensor]


def gram(
    A: Tensor, Bt: Tensor, c: Tensor | None, rank: int, streams: Tensor | None = None
) -> Result:
    return ops.gram_svd(A, Bt, c, rank=rank)


def randomized(
    A: Tensor, Bt: Tensor, c: Tensor | None, rank: int, streams: Tensor | None = None
) -> Result:
    return ops.randomized_svd(A, Bt, c, rank=rank, oversampling=rank, streams=streams)


def dense(
    A: Tensor, Bt: Tensor, c: Tensor | None, rank: int, streams: Tensor | None = None
) -> Result:
    W = ops.reconstruct(A, Bt, c)
    return ops.randomized_svd_dense(W, rank=rank, oversampling=rank, streams=streams)


ALL = [gram, randomized, dense]


@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize("bt_dtype", DTYPES)
@pytest.mark.parametrize("a_dtype", DTYPES)
def test_results_and_statistics(
    a_dtype: torch.dtype, bt_dtype: torch.dtype, op: Any, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, 3, 7, 100, 90, a_dtype, bt_dtype)
    c = torch.rand(3, 7, generator=rng, dtype=torch.float64)
    U, S, Vt, stats = op(A, Bt, c, 10)
    assert (U.shape, S.shape, Vt.shape, stats.shape) == ((3, 100, 10), (3, 10), (3, 10, 90), (3, 3))
    assert (U.dtype, stats.dtype) == (torch.float32, torch.float64)
    dW = product(A, Bt, c)
    norm2 = dW.square().sum((1, 2))
    torch.testing.assert_close((U.double() * S.double()[:, None]) @ Vt.double(), dW, rtol=0, atol=1e-4)
    torch.testing.assert_close(stats[:, 0], norm2, rtol=1e-6, atol=0)
    assert (stats[:, 1] <= 1e-5 * norm2).all()
    assert stats[:, 2].tolist() == [7.0] * 3


@pytest.mark.parametrize("op", ALL)
def test_a_module_has_the_same_bits_alone_and_in_a_bucket(op: Any, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 4, 45, 1101, 131, torch.bfloat16)
    c = torch.rand(4, 45, generator=rng)
    # One module whose clients cancel takes another path inside.
    A[2, 20:40], Bt[2, 20:40] = A[2, :20], -Bt[2, :20]
    c[2] = 1
    together = op(A, Bt, c, 12)
    for module in range(4):
        one = slice(module, module + 1)
        alone = op(A[one], Bt[one], c[one], 12, torch.tensor([module]))
        assert all(torch.equal(x, y[one]) for x, y in zip(alone, together, strict=True))
    again = op(A, Bt, c, 12)
    assert all(torch.equal(x, y) for x, y in zip(again, together, strict=True))


def philox(key: int, low: int, high: int) -> list[int]:
    """Philox4x32-10 after Salmon et al., SC 2011, table 2, in Python's integers."""
    mask = 0xFFFFFFFF
    counter = [low & mask, low >> 32, high & mask, high >> 32]
    keys = [key & mask, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ keys[0],
            second & mask,
            (first >> 32) ^ counter[3] ^ keys[1],
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) & mask, (keys[1] + 0xBB67AE85) & mask]
    return counter


def rademacher(seed: int, stream: int, size: int, columns: int) -> Tensor:
    bits: list[int] = []
    for block in range(-(-size * columns // 128)):
        for word in philox(seed % 2**64, block, stream % 2**64):
            bits += [(word >> i) & 1 for i in range(32)]
    signs = torch.tensor(bits[: size * columns], dtype=torch.float64) * 2 - 1
    return signs.view(size, columns)


SKETCH_ERROR = 1e-5
"""Of the span of dW Omega, where no power iteration makes up for rounding."""


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 0), (-5, 3), (2**62 + 11, 2**40), (9, -1)])
def test_the_test_matrix_is_philox_by_seed_stream_and_element(
    seed: int, stream: int, rng: torch.Generator
) -> None:
    """Without power iterations U spans dW Omega: nothing of that lies beside it."""
    A, Bt = random_stack(rng, 1, 70, 150, 170)
    W = product(A, Bt)
    streams = torch.tensor([stream])
    call = {"rank": 20, "oversampling": 0, "power_iterations": 0, "seed": seed, "streams": streams}
    for U, _, _, _ in (
        ops.randomized_svd(A, Bt, None, **call),
        ops.randomized_svd_dense(W.float(), **call),
    ):
        Y = W[0] @ rademacher(seed, stream, 170, 20)
        U = U[0].double()
        assert float((Y - U @ (U.mT @ Y)).norm() / Y.norm()) < SKETCH_ERROR
        other = W[0] @ rademacher(seed, stream + 1, 170, 20)
        assert float((other - U @ (U.mT @ other)).norm() / other.norm()) > 0.1


@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize(
    ("modules", "rows", "m", "n", "rank"),
    [
        (0, 3, 4, 5, 2),
        (2, 0, 4, 5, 2),
        (2, 3, 0, 5, 2),
        (2, 3, 4, 0, 2),
        (2, 3, 4, 5, 0),
        (1, 0, 0, 0, 0),
    ],
)
def test_empty_sizes(
    modules: int, rows: int, m: int, n: int, rank: int, op: Any, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, modules, rows, m, n)
    U, S, Vt, stats = op(A, Bt, None, rank)
    assert (U.shape, S.shape) == ((modules, m, rank), (modules, rank))
    assert (Vt.shape, stats.shape) == ((modules, rank, n), (modules, 3))
    assert not (U.any() or S.any() or Vt.any())
    expected = product(A, Bt).square().sum((1, 2))
    torch.testing.assert_close(stats[:, 0], expected, rtol=1e-6, atol=0)


def test_more_columns_asked_for_than_an_integer_holds(rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 5, 9, 7)
    expected = ops.gram_svd(A, Bt, rank=3)[1]
    for oversampling in (2**40, 2**63 - 1):
        found = ops.randomized_svd(A, Bt, rank=3, oversampling=oversampling)[1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tall_cores_on_two_threads(rng: torch.Generator) -> None:
    """A frozen A gives a core with many more rows than columns, whose SVD must not wait for threads
    that a parallel region does not have (MKL's dgeqrf does)."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for rows, rank in [(160, 16), (160, 40), (320, 64)]:
            A, Bt = random_stack(rng, 1, rows, 400, 380)
            A = A[:, :rank].repeat(1, rows // rank, 1)
            for pair in ((A, Bt[:, : A.shape[1]]), (Bt[:, : A.shape[1]], A)):
                _, S, _, stats = ops.gram_svd(*pair, rank=8)
                exact = torch.linalg.svdvals(product(*pair)[0])
                torch.testing.assert_close(S[0].double(), exact[:8], rtol=1e-6, atol=0)
                assert int(stats[0, 2]) == rank
    finally:
        torch.set_num_threads(threads)


A, BT = torch.ones(2, 5, 7), torch.ones(2, 5, 9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"A": A[0]}, ["'A'", "three dimensions", "(5, 7)"]),
        ({"A": A.int()}, ["'A'", "Double", "Int"]),
        ({"Bt": BT[:, :4]}, ["'Bt'", "(2, 5, 7)", "(2, 4, 9)"]),
        ({"c": torch.ones(2, 4)}, ["'coefficients'", "(2, 5)", "(2, 4)"]),
        ({"c": torch.ones(2, 5).bfloat16()}, ["'coefficients'", "Double", "BFloat16"]),
        ({"rank": -1}, ["'rank'", "at least 0", "-1"]),
        ({"rank": 2**62}, ["'rank'", "2^63"]),
    ],
)
def test_argument_errors(arguments: dict[str, Any], words: list[str]) -> None:
    call = {"A": A, "Bt": BT, "c": None, "rank": 3, **arguments}
    for op in (gram, randomized):
        with pytest.raises(RuntimeError, match=r"fastagg::\w+: argument") as caught:
            op(call["A"], call["Bt"], call["c"], call["rank"])
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"oversampling": -1}, ["'oversampling'", "at least 0", "-1"]),
        ({"power_iterations": -1}, ["'power_iterations'", "at least 0", "-1"]),
        ({"streams": torch.zeros(3, dtype=torch.int64)}, ["'streams'", "(2)", "(3)"]),
        ({"streams": torch.zeros(2)}, ["'streams'", "Long", "Float"]),
    ],
)
def test_argument_errors_of_a_sketch(arguments: dict[str, Any], words: list[str]) -> None:
    call = {"rank": 3, "oversampling": 2, **arguments}
    for attempt in (
        lambda: ops.randomized_svd(A, BT, **call),
        lambda: ops.randomized_svd_dense(torch.ones(2, 9, 7), **call),
    ):
        with pytest.raises(RuntimeError, match=r"fastagg::\w+: argument") as caught:
            attempt()
        assert all(word in str(caught.value) for word in words)


def test_argument_errors_of_a_dense_update() -> None:
    with pytest.raises(RuntimeError, match=r"'W': expected shape \(modules, m, n\), got \(9, 7\)"):
        ops.randomized_svd_dense(torch.ones(9, 7), rank=2, oversampling=2)
    with pytest.raises(RuntimeError, match=r"'W': expected dtype Float, .*got Long"):
        ops.randomized_svd_dense(torch.ones(1, 9, 7).long(), rank=2, oversampling=2)


def test_a_sketch_too_large_to_count_is_refused() -> None:
    huge = torch.empty(1, 0, 2**31)
    with pytest.raises(RuntimeError, match=r"randomized_svd: argument '(rank|oversampling)'"):
        ops.randomized_svd(huge, huge, rank=1, oversampling=2**31)
