"""What is drawn: flat buffers and tables that say the same as the lists of tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_cases import MANY_ROWS, UNEVEN, dense, drawn, off, updates

from fastagg import ops
from fastagg.bench.cases import CASES, Case, Projection
from fastagg.bench.workload import FactorKind, Workload

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS: tuple[FactorKind, ...] = ("random", "signal")


@pytest.mark.parametrize("case", [UNEVEN, MANY_ROWS], ids=lambda case: case.name)
@pytest.mark.parametrize("factors", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_describe_the_same_update_as_the_tensors(
    case: Case, factors: FactorKind, dtype: torch.dtype, seed: int
) -> None:
    workload = drawn(case, seed=seed, dtype=dtype, factors=factors)
    assert (workload.dtype, workload.modules) == (dtype, case.modules)
    for bucket in workload.buckets:
        A, Bt, *_ = ops.stack(
            bucket.flats,
            bucket.slots,
            bucket.scale,
            modules=bucket.modules,
            rows=bucket.rows,
            m=bucket.m,
            n=bucket.n,
            dtype=torch.float32,
        )
        for index in range(bucket.modules):
            module = bucket.module(index)
            assert {t.dtype for t in (*module.As, *module.Bs)} == {dtype}
            assert [tuple(t.shape) for t in module.As] == [(r, bucket.n) for r in bucket.ranks]
            assert [tuple(t.shape) for t in module.Bs] == [(bucket.m, r) for r in bucket.ranks]
            assert off(Bt[index].mT.double() @ A[index].double(), dense(module)) < 1e-6
            left, right = module.reference()[::-1]
            assert off(left @ right, dense(module)) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_and_owners_of_the_stacks_rows(dtype: torch.dtype, seed: int) -> None:
    """Row by row, as the decompositions take them: each client's part of dW."""
    for bucket in drawn(UNEVEN, seed=seed, dtype=dtype).buckets:
        A, Bt = bucket.stack()
        assert A.dtype == dtype
        for index in range(bucket.modules):
            for client, update in enumerate(updates(bucket.module(index))):
                own = bucket.owners[index] == client
                weighted = bucket.coefficients[index][:, None] * A[index].double()
                assert int(own.sum()) == bucket.ranks[client]
                assert off(Bt[index][own].double().mT @ weighted[own], update) < 1e-14


def test_weights_are_shares_times_the_scaling(seed: int) -> None:
    """Unequal, or a mistake in a weight would not be seen; p_k add up to 1, s_k is 2."""
    for bucket in drawn(UNEVEN, seed=seed).buckets:
        assert sum(bucket.shares) == pytest.approx(2.0, rel=1e-14)
        assert len(set(bucket.shares)) == UNEVEN.clients
        assert min(bucket.shares) > 0


def test_a_bucket_is_a_shape_and_its_ranks(seed: int) -> None:
    workload = drawn(UNEVEN, seed=seed)
    assert [(b.m, b.n, b.ranks) for b in workload.buckets] == [
        (24, 16, (6, 3, 1)),
        (40, 24, (4, 3, 2)),
    ]
    assert workload.buckets[0].names == (
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.k_proj",
    )
    assert workload.nbytes == UNEVEN.elements_per_layer * UNEVEN.layers * 4


def test_one_shape_with_other_ranks_is_another_bucket(seed: int) -> None:
    """FlexLoRA's clients have other ranks in attention than in the feed-forward block."""
    published = CASES["flexlora-1.3b-80"]
    small = tuple(
        replace(p, m=12, n=8, ranks=tuple(r // 4 for r in p.ranks)) for p in published.projections
    )
    workload = drawn(replace(published, layers=2, projections=small), seed=seed)
    assert [b.modules for b in workload.buckets] == [8, 6]
    attention, feed_forward = workload.buckets
    assert attention.ranks != feed_forward.ranks
    for bucket in workload.buckets:
        assert bucket.ranks in {p.ranks for p in small}
        A, Bt = bucket.stack()
        for index in range(bucket.modules):
            weighted = bucket.coefficients[index][:, None] * A[index].double()
            assert off(Bt[index].double().mT @ weighted, dense(bucket.module(index))) < 1e-14


def same_memory(part: Workload, whole: Workload) -> bool:
    return all(
        mine.data_ptr() == theirs.data_ptr()
        for bucket in part.buckets
        for other in whole.buckets
        if (other.m, other.n, other.ranks) == (bucket.m, bucket.n, bucket.ranks)
        for mine, theirs in zip(bucket.flats, other.flats, strict=True)
    )


def test_first_layers_are_a_prefix_of_the_same_memory(seed: int) -> None:
    whole = drawn(replace(UNEVEN, layers=3), seed=seed)
    part = whole.first_layers(2)
    assert (part.modules, part.layers) == (6, 2)
    assert same_memory(part, whole)
    for bucket, other in zip(part.buckets, whole.buckets, strict=True):
        assert bucket.names == other.names[: bucket.modules]
        assert {name.split(".")[1] for name in bucket.names} == {"0", "1"}
        for index in range(bucket.modules):
            assert torch.equal(dense(bucket.module(index)), dense(other.module(index)))
        A, Bt = bucket.stack()
        whole_A, whole_Bt = other.stack()
        assert torch.equal(A, whole_A[: bucket.modules])
        assert torch.equal(Bt, whole_Bt[: bucket.modules])
    assert part.nbytes * 3 == whole.nbytes * 2


@pytest.mark.parametrize("wide_first", [True, False])
def test_smallest_is_one_module_of_the_smallest_shape(wide_first: bool, seed: int) -> None:
    order = UNEVEN.projections[::-1] if wide_first else UNEVEN.projections
    whole = drawn(replace(UNEVEN, projections=order[1:] + order[:1]), seed=seed)
    one = whole.smallest()
    assert one.modules == 1
    assert (one.buckets[0].m, one.buckets[0].n) == (24, 16)
    assert same_memory(one, whole)
    first = next(b for b in whole.buckets if b.m == 24)
    assert torch.equal(dense(one.by_module()[0]), dense(first.module(0)))


@pytest.mark.parametrize("factors", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_seed_gives_the_same_bits_and_another_others(
    factors: FactorKind, dtype: torch.dtype, seed: int
) -> None:
    first, again, other = (
        drawn(UNEVEN, seed=s, dtype=dtype, factors=factors).buckets for s in (seed, seed, seed + 1)
    )
    for a, b, c in zip(first, again, other, strict=True):
        for x, y, z in zip(a.flats, b.flats, c.flats, strict=True):
            assert torch.equal(x, y)
            assert float((x == z).double().mean()) < 0.2  # of short dtypes a few entries meet by chance
    # Nor does a module repeat another.
    assert not torch.equal(dense(first[0].module(0)), dense(first[0].module(1)))


def energy(matrix: torch.Tensor, columns: int) -> float:
    """The leading singular values' share of |dW|^2."""
    squares = torch.linalg.svdvals(matrix) ** 2
    return float(squares[:columns].sum() / squares.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_signals_spectrum_decays_and_the_random_ones_does_not(dtype: torch.dtype, seed: int) -> None:
    """The signal's singular values fall by e in 16 columns: 63% of its energy is in the first eight. Of
    104 alike ones these have 8%, more where weights and chance make them unequal."""
    case = Case("one", "", 1, (Projection("q", 512, 384, (32, 32, 24, 16)),))
    signal = dense(drawn(case, seed=seed, dtype=dtype, factors="signal").by_module()[0])
    random = dense(drawn(case, seed=seed, dtype=dtype, factors="random").by_module()[0])
    assert energy(signal, 8) > 0.6
    assert energy(signal, 32) > 0.99
    assert energy(random, 8) < 0.4
    assert energy(random, 32) < 0.8


def test_clients_share_the_signal_and_nothing_of_random_factors(seed: int) -> None:
    case = Case("one", "", 1, (Projection("q", 128, 96, (16, 16)),))

    def cosine(factors: FactorKind) -> float:
        x, y = updates(drawn(case, seed=seed, factors=factors).by_module()[0])
        return float((x * y).sum() / (x.norm() * y.norm()))

    assert cosine("signal") > 0.9
    assert abs(cosine("random")) < 0.1
