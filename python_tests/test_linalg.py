"""fastagg.truncated_svd: shapes, dtypes, batches, seeds, errors, and what a decomposition tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import normal, product, random_stack
from svd_accuracy import Reference, loss_of_orthogonality
from svd_cases import CASES, Case
from test_linalg_hostile import check
from torch import Tensor

import fastagg
from fastagg.linalg import ROUTES, fastest_route, svd_of_dense, svd_of_stack

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def factors(rng: torch.Generator, *batch: int, R: int = 9, m: int = 30, n: int = 20) -> Any:
    return torch.randn(*batch, R, n, generator=rng), torch.randn(*batch, m, R, generator=rng)


@settings(max_examples=60)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    R=st.integers(1, 50),
    rank=st.integers(1, 45),
    a_dtype=st.sampled_from(DTYPES),
    b_dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from((None, torch.float32, torch.float64, torch.bfloat16)),
    decades=st.integers(0, 12),
    route=st.sampled_from(ROUTES),
    seed=st.integers(0, 2**31),
)
def test_the_promise_for_any_shape_and_dtype(
    m: int,
    n: int,
    R: int,
    rank: int,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    kind: torch.dtype | None,
    decades: int,
    route: str,
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -decades / 2, R)
    A = (normal(rng, R, n) * decay[:, None]).to(a_dtype)
    B = (normal(rng, m, R) * decay).to(b_dtype)
    c = None if kind is None else torch.randn(R, generator=rng).to(kind)
    check(Case(A, B, c), rank, route, seed)


@pytest.mark.parametrize("name", ["flat spectrum", "ten identical clients", "gauge 1e6"])
@pytest.mark.parametrize("route", ROUTES)
def test_two_hundred_clients(name: str, route: str, rng: torch.Generator, seed: int) -> None:
    """More rows than either side: auto takes a sketch, the exact routes stay exact."""
    case = CASES[name](120, 90, 800, rng)
    info = check(case, 12, route, seed)
    if route == "auto":
        assert info.route == fastest_route(120, 90, case.A.shape[0], 24)


def test_the_route_on_a_gpu_depends_on_the_rows_alone() -> None:
    gpu = torch.device("cuda")
    for m, n, columns in ((4096, 4096, 128), (64, 20_000, 16), (8, 8, 4)):
        assert fastest_route(m, n, 1024, columns, device=gpu) == "gram"
        assert fastest_route(m, n, 1025, columns, device=gpu) == "randomized"
        assert fastest_route(m, n, 160, columns, device=torch.device("cpu")) == fastest_route(
            m, n, 160, columns
        )


def halko(W: Tensor, columns: int, rank: int, iterations: int, rng: torch.Generator) -> Tensor:
    """Halko, Martinsson and Tropp's algorithm 4.4 in float64: the error of its rank-r result."""
    omega = torch.randn(W.shape[1], columns, generator=rng, dtype=torch.float64)
    Q = torch.linalg.qr(W @ omega)[0]
    for _ in range(iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q)[0])[0]
    U, S, Vt = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return (W - Q @ (U[:, :rank] * S[:rank]) @ Vt[:rank]).norm()


@pytest.mark.parametrize("route", ["randomized", "dense"])
def test_a_sketch_is_as_good_as_the_published_one(route: str, rng: torch.Generator) -> None:
    A, B = factors(rng, R=300, m=400, n=350)
    reference = Reference.of(A, B, None)
    optimal, W = reference.optimal(32), B.double() @ A.double()
    for iterations, oversampling in [(0, 32), (1, 8), (2, 32), (4, 32)]:
        U, S, Vt, info = fastagg.truncated_svd(
            A, B, 32, route=route, power_iterations=iterations, oversampling=oversampling, seed=5
        )
        gap = reference.error(U, S, Vt) - optimal
        published = float(halko(W, 32 + oversampling, 32, iterations, rng)) - optimal
        assert gap <= 2 * published
        assert (optimal + gap) ** 2 - optimal**2 <= float(info.certificate)


def test_one_decomposition_serves_every_rank(rng: torch.Generator) -> None:
    A, B = factors(rng, R=40, m=90, n=80)
    reference = Reference.of(A, B, None)
    U, S, Vt, info = fastagg.truncated_svd(A, B, 32, route="gram")
    energy = reference.sigma.square()
    for rank in (1, 4, 16, 32):
        error = reference.error(U[:, :rank], S[:rank], Vt[:rank])
        assert error <= reference.optimal(rank) + 2e-6 * reference.norm
        expected = float(energy[:rank].sum() / energy.sum())
        assert float(info.kept(rank)) == pytest.approx(expected, abs=1e-6)


def test_the_order_of_clients_does_not_matter(rng: torch.Generator) -> None:
    A, B = factors(rng, R=40, m=90, n=80)
    order = torch.randperm(40, generator=rng)
    for route in ("gram", "qr"):
        U, S, Vt, _ = fastagg.truncated_svd(A, B, 8, route=route)
        u, s, vt, _ = fastagg.truncated_svd(A[order], B[:, order], 8, route=route)
        torch.testing.assert_close(s, S, rtol=1e-6, atol=0)
        # Signs are fixed and no singular values tie: the vectors themselves agree.
        torch.testing.assert_close(u, U, rtol=0, atol=1e-5)
        torch.testing.assert_close(vt, Vt, rtol=0, atol=1e-5)


def test_exact_routes_agree_on_vectors_that_are_defined(rng: torch.Generator) -> None:
    A, B = factors(rng, R=12, m=90, n=80)
    gram, qr = (fastagg.truncated_svd(A, B, 12, route=route)[:3] for route in ("gram", "qr"))
    W = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    for (U, S, Vt) in (gram, qr):
        torch.testing.assert_close(S.double(), W.S[:12], rtol=1e-6, atol=0)
        for found, exact in ((U.mT, W.U[:, :12].mT), (Vt, W.Vh[:12])):
            sign = (found.double() * exact).sum(1, keepdim=True).sign()
            torch.testing.assert_close(found.double(), exact * sign, rtol=0, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_batches_broadcast(route: str, rng: torch.Generator) -> None:
    A, B = factors(rng, 2, 1)[0], factors(rng, 3)[1]
    c = torch.rand(9, generator=rng)
    U, S, Vt, info = fastagg.truncated_svd(A, B, 4, coefficients=c, route=route)
    assert (U.shape, S.shape, Vt.shape) == ((2, 3, 30, 4), (2, 3, 4), (2, 3, 4, 20))
    assert info.S.shape == (6, 4)
    assert torch.equal(info.U.view(2, 3, 30, 4), U)
    assert info.norm2.shape == info.certificate.shape == info.numerical_rank.shape == (6,)
    for i in range(2):
        for j in range(3):
            reference = Reference.of(A[i, 0], B[j], c)
            error = reference.error(U[i, j], S[i, j], Vt[i, j])
            assert error <= reference.optimal(4) + 0.03 * reference.norm
    batched = torch.rand(5, 1, 1, 9, generator=rng)
    assert fastagg.truncated_svd(A, B, 4, coefficients=batched, route=route)[1].shape == (5, 2, 3, 4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("batch", "R", "m", "n"),
    [((), 0, 6, 5), ((), 4, 0, 5), ((), 4, 6, 0), ((0,), 4, 6, 5), ((2, 0), 4, 6, 5), ((3,), 0, 0, 0)],
)
def test_nothing_to_decompose(
    batch: tuple[int, ...], R: int, m: int, n: int, route: str, rng: torch.Generator
) -> None:
    A, B = factors(rng, *batch, R=R, m=m, n=n)
    U, S, Vt, info = fastagg.truncated_svd(A, B, 3, coefficients=torch.ones(R), route=route)
    assert (U.shape, S.shape, Vt.shape) == ((*batch, m, 3), (*batch, 3), (*batch, 3, n))
    assert not (U.any() or S.any() or Vt.any())
    assert not (info.norm2.any() or info.certificate.any() or info.numerical_rank.any())
    assert torch.equal(info.kept(2), torch.ones(len(info.norm2), dtype=torch.float64))


@pytest.mark.parametrize("route", ROUTES)
def test_any_strides_and_inputs_that_require_a_gradient(route: str, rng: torch.Generator) -> None:
    A, B = factors(rng, 2)
    c = torch.rand(2, 9, generator=rng)
    expected = fastagg.truncated_svd(A, B, 4, coefficients=c, route=route)
    strided = A.mT.contiguous().mT, torch.stack([B, B], -1)[..., 1]
    found = fastagg.truncated_svd(*strided, 4, coefficients=c.mT.contiguous().mT, route=route)
    learnt = [tensor.clone().requires_grad_() for tensor in (A, B, c)]
    tracked = fastagg.truncated_svd(*learnt[:2], 4, coefficients=learnt[2], route=route)
    for x, y, z in zip(found[:3], tracked[:3], expected[:3], strict=True):
        assert torch.equal(y, z)
        assert not y.requires_grad
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)
    for tensor, copy in zip((A, B, c), learnt, strict=True):
        assert torch.equal(tensor, copy), "inputs stay as they were"


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_float32_unless_a_factor_is_float64(
    dtype: torch.dtype, rng: torch.Generator
) -> None:
    A, B = factors(rng)
    for route in ROUTES:
        U, S, Vt, _ = fastagg.truncated_svd(A.to(dtype), B, 3, route=route)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert {U.dtype, S.dtype, Vt.dtype} == {expected}
        if dtype == torch.float64:
            reference = Reference.of(A, B, None)
            if route in ("gram", "qr"):
                torch.testing.assert_close(S, reference.leading(3), rtol=1e-13, atol=0)
                assert loss_of_orthogonality(U, S, Vt) < 1e-13


def test_the_seed_and_the_stream_decide_a_sketch(rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 4, 60, 90, 80)
    call = {"route": "randomized", "streams": torch.tensor([7, 3, 2**62, 0])}
    first = svd_of_stack(A, Bt, None, 6, seed=11, **call)
    again = svd_of_stack(A, Bt, None, 6, seed=11, **call)
    other = svd_of_stack(A, Bt, None, 6, seed=12, **call)
    assert torch.equal(first.U, again.U)
    assert not torch.equal(first.S, other.S)
    # A module's stream goes with it, however modules are grouped and ordered.
    order = torch.tensor([2, 0, 3, 1])
    call["streams"] = call["streams"][order]
    moved = svd_of_stack(A[order], Bt[order], None, 6, seed=11, **call)
    for x, y in zip((moved.U, moved.S, moved.Vt), (first.U, first.S, first.Vt), strict=True):
        assert torch.equal(x, y[order])
    default = svd_of_stack(A, Bt, None, 6, seed=11, route="randomized")
    counted = svd_of_stack(A, Bt, None, 6, seed=11, route="randomized", streams=torch.arange(4))
    assert torch.equal(default.U, counted.U)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_update(dtype: torch.dtype, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 3, 10, 40, 50)
    W = product(A, Bt).to(dtype)
    d = svd_of_dense(W, 10, seed=3)
    assert d.route == "dense"
    for module in range(3):
        exact = W[module].double()
        result = (d.U[module].double() * d.S[module].double()) @ d.Vt[module].double()
        optimal = torch.linalg.svdvals(exact)[10:].norm()
        excess = float(((exact - result).norm() - optimal) / exact.norm())
        assert excess <= 2e-6
        torch.testing.assert_close(d.norm2[module], exact.square().sum(), rtol=1e-12, atol=0)
    assert torch.equal(svd_of_dense(W[1:2], 10, seed=3, streams=torch.tensor([1])).U, d.U[1:2])


def test_one_bad_module_of_a_stack_is_nan_and_the_others_are_untouched(rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 3, 9, 30, 20)
    bad = A.clone()
    bad[1, 4, 4] = torch.inf
    for route in ("gram", "qr", "randomized", "dense"):
        good = svd_of_stack(A, Bt, None, 4, route=route)
        found = svd_of_stack(bad, Bt, None, 4, route=route)
        for x, y in (
            (found.U, good.U),
            (found.S, good.S),
            (found.Vt, good.Vt),
            (found.norm2, good.norm2),
            (found.certificate, good.certificate),
        ):
            assert torch.equal(x[[0, 2]], y[[0, 2]])
            assert x[1].isnan().all()
    assert svd_of_dense(product(bad, Bt).float(), 4).S[1].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(9)}, r"A: expected at least two dimensions, got \(9,\)"),
        ({"A": torch.ones(9, 20).int()}, "A: expected float32, .* got torch.int32"),
        ({"B": torch.ones(30, 9) * 1j}, "B: expected float32, .* got torch.complex64"),
        ({"B": torch.ones(30, 8)}, r"must share R, got \(9, 20\) and \(30, 8\)"),
        ({"B": torch.ones(9, 30)}, r"must share R, got \(9, 20\) and \(9, 30\)"),
        ({"coefficients": torch.ones(8)}, r"coefficients: expected \(..., 9\), got \(8,\)"),
        ({"coefficients": torch.tensor(2.0)}, r"coefficients: expected \(..., 9\), got \(\)"),
        ({"rank": 0}, "rank: expected an integer of at least 1, got 0"),
        ({"rank": 2.0}, "rank: expected an integer of at least 1, got 2.0"),
        ({"rank": True}, "rank: expected an integer of at least 1, got True"),
        ({"route": "lapack"}, "route: expected one of auto, gram, .* got 'lapack'"),
        ({"oversampling": -1}, "oversampling: expected at least 0, got -1"),
        ({"power_iterations": -1}, "power_iterations: expected at least 0, got -1"),
        ({"A": torch.ones(2, 9, 20), "B": torch.ones(3, 30, 9)}, r"broadcast, got \(2,\) and \(3,\)"),
        ({"A": torch.ones(9, 20, device="meta")}, "one device"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"A": torch.ones(9, 20), "B": torch.ones(30, 9), "rank": 4, **change}
    with pytest.raises(ValueError, match=message):
        fastagg.truncated_svd(call.pop("A"), call.pop("B"), call.pop("rank"), **call)
