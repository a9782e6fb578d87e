"""dW of an Aggregate in factors, against the equations in float64."""

from __future__ import annotations

import pytest
import torch
from equations import (
    EMBEDDING,
    SHAPES,
    as_matrix,
    client,
    exact,
    mixed_round,
    norm_shares,
    one_thread,  # noqa: F401
    padded_means,
    shares,
)

import fastagg
from fastagg.errors import InvalidInput

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
MODULE = {"layers.0.fc": (6, 5)}


@pytest.mark.parametrize("missing", ["renormalise", "zero"])
@pytest.mark.parametrize("method", ["flora", "flexlora"])
def test_the_stacks_factors_are_the_exact_sum(seed: int, method: str, missing: str) -> None:
    clients = mixed_round(seed, DTYPES)
    result = fastagg.aggregate(
        [each.update for each in clients], method, missing=missing, accumulator="stack"
    )
    for module in result.modules:
        factors = result.factors(module)
        assert factors is not None
        a, b = factors
        expected = exact(clients, module, missing)
        ranks = [each.adapter.rank(module) for each in clients if module in each.modules]
        assert (*b.shape, *a.shape) == (len(expected), sum(ranks), sum(ranks), expected.shape[1])
        assert a.dtype == b.dtype == torch.float64
        assert (b @ a - expected).norm() <= 1e-14 * expected.norm()


@pytest.mark.parametrize("method", ["fedit", "zeropad", "hetlora"])
def test_the_means_factors_are_the_averages(seed: int, method: str) -> None:
    clients = mixed_round(seed, DTYPES)
    if method == "fedit":
        clients = [client(f"c{k}", 8, seed=seed + k, weight=k + 1, special=True) for k in range(3)]
    result = fastagg.aggregate([each.update for each in clients], method)
    for module in result.modules:
        factors = result.factors(module)
        assert factors is not None
        a, b = factors
        share = norm_shares(clients, module)
        if method != "hetlora":
            share = shares(clients, module, "renormalise")
        mean_a, mean_b = padded_means(clients, module, share)
        torch.testing.assert_close(a, mean_a, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(b, mean_b, rtol=1e-6, atol=1e-6)
        got = as_matrix(result.delta(module), b @ a, module == EMBEDDING)
        assert (got - b @ a).norm() <= 1e-6 * got.norm()  # of the numbers that delta multiplies


def test_dw_alone_has_no_factors(seed: int) -> None:
    update = client("a", seed=seed).update
    result = fastagg.aggregate([update], "flexlora", accumulator="dense")
    assert all(result.factors(module) is None for module in result.modules)


@pytest.mark.parametrize("accumulator", ["stack", "dense"])
def test_factors_of_no_module_are_refused(seed: int, accumulator: str) -> None:
    update = client("a", seed=seed).update
    result = fastagg.aggregate([update], "flexlora", accumulator=accumulator)
    with pytest.raises(InvalidInput, match="no client has this module"):
        result.factors("layers.9.fc")


@pytest.mark.parametrize("size", [1e37, 1e-37])
def test_scaled_factors_may_leave_the_range_of_float32(seed: int, size: float) -> None:
    """Where dW does not: s A does, and B is what keeps dW within."""
    large = client("a", 4, seed=seed, modules=MODULE, alpha=4e4 if size > 1 else 4e-4)
    state = {
        key: tensor * (size if "lora_A" in key else 1e-4 / size)
        for key, tensor in large.adapter.state_dict().items()
    }
    adapter = fastagg.Adapter(state, large.adapter.config, name="a")
    result = fastagg.aggregate([fastagg.ClientUpdate(adapter, client_id="a")], "flora")
    a, b = adapter.factors("layers.0.fc")
    expected = adapter.scaling("layers.0.fc") * b.double() @ a.double()
    factors = result.factors("layers.0.fc")
    assert factors is not None
    assert torch.isfinite(expected).all() and expected.any()
    assert (factors[1] @ factors[0] - expected).norm() <= 1e-14 * expected.norm()


def test_a_float64_matrix_gets_the_exact_sum_either_way_round(seed: int) -> None:
    clients = mixed_round(seed)
    result = fastagg.aggregate([each.update for each in clients], "flora")
    for module in (*SHAPES, EMBEDDING):
        expected = exact(clients, module)
        upright = torch.ones_like(expected)
        turned = torch.ones_like(expected.t())
        result.add_delta(module, upright)
        result.add_delta(module, turned, transposed=True)
        for got in (upright, turned.t()):
            assert (got - 1 - expected).norm() <= 1e-13 * (1 + expected.norm())
