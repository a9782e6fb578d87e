"""Server optimisers against their equations, written in float64 number by number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastagg.errors import InvalidInput
from fastagg.federated.server.server_optimisers import (
    OPTIMISERS,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimiser,
)

# Number by number: the pseudo-gradients of one element in, its changes out.
Reference = Callable[[list[float]], Iterator[float]]


def fedavgm(eta: float, beta: float) -> Reference:
    def changes(gradients: list[float]) -> Iterator[float]:
        m = 0.0
        for d in gradients:
            m = beta * m + d
            yield eta * m

    return changes


def adaptive(kind: str, eta: float, beta1: float, beta2: float, tau: float) -> Reference:
    def changes(gradients: list[float]) -> Iterator[float]:
        m, v = 0.0, tau**2
        for d in gradients:
            m = beta1 * m + (1 - beta1) * d
            if kind == "adam":
                v = beta2 * v + (1 - beta2) * d * d
            else:
                v = v - (1 - beta2) * (d * d) * ((v > d * d) - (v < d * d))
            yield eta * m / (math.sqrt(v) + tau)

    return changes


rates = st.floats(1e-3, 10.0)
shares = st.one_of(st.just(0.0), st.floats(0.01, 0.999))
taus = st.floats(1e-4, 0.1)
# Pseudo-gradients of very unlike sizes, which the adaptive ones normalise.
sizes = st.one_of(st.just(0.0), st.floats(1e-10, 1e-4), st.floats(1e-4, 10.0))
gradients = st.lists(st.builds(math.copysign, sizes, st.sampled_from([-1, 1])), min_size=1, max_size=6)


def check(optimiser: ServerOptimiser, reference: Reference, sequence: list[float]) -> None:
    moments: dict[str, torch.Tensor] = {}
    scale = 0.0
    for d, expected in zip(sequence, reference(sequence), strict=True):
        gradient = torch.full((2, 3), d, dtype=torch.float64)
        given_moments = dict(moments)
        copies = {name: moment.clone() for name, moment in moments.items()}
        change, moments = optimiser.step(gradient, given_moments)
        # m adds up numbers of either sign, so its rounding is that of the largest before.
        scale = max(scale, abs(expected), float(change.abs().max()))
        assert change.shape == gradient.shape
        assert (change - expected).abs().max() <= 1e-10 * scale
        assert bool((gradient == d).all())
        assert given_moments.keys() == copies.keys()
        assert all(torch.equal(given_moments[name], copies[name]) for name in copies)


@given(sequence=gradients, eta=rates, beta=shares)
def test_fedavgm(sequence: list[float], eta: float, beta: float) -> None:
    check(FedAvgM(eta, beta), fedavgm(eta, beta), sequence)


@given(sequence=gradients, eta=rates, beta1=shares, beta2=shares, tau=taus)
def test_fedadam(
    sequence: list[float], eta: float, beta1: float, beta2: float, tau: float
) -> None:
    check(FedAdam(eta, beta1, beta2, tau), adaptive("adam", eta, beta1, beta2, tau), sequence)


@given(sequence=gradients, eta=rates, beta1=shares, beta2=shares, tau=taus)
def test_fedyogi(
    sequence: list[float], eta: float, beta1: float, beta2: float, tau: float
) -> None:
    check(FedYogi(eta, beta1, beta2, tau), adaptive("yogi", eta, beta1, beta2, tau), sequence)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_float32_stays_float32(name: str, rng: torch.Generator) -> None:
    moments: dict[str, torch.Tensor] = {}
    for _ in range(2):
        change, moments = OPTIMISERS[name]().step(torch.randn(4, 3, generator=rng), moments)
        assert {each.dtype for each in (change, *moments.values())} == {torch.float32}


def test_yogi_forgets_a_large_gradient_slowly_and_adam_at_once() -> None:
    """What sets them apart: after one large D, v falls by a share of D^2 and not of v."""
    large, small = torch.full((1,), 1.0), torch.full((1,), 1e-2)
    v = {}
    for optimiser in (FedAdam(beta2=0.5), FedYogi(beta2=0.5)):
        _, moments = optimiser.step(large, {})
        _, moments = optimiser.step(small, moments)
        v[type(optimiser)] = float(moments["v"])
    assert v[FedAdam] == pytest.approx(0.25, rel=1e-3)
    assert v[FedYogi] == pytest.approx(0.5, rel=1e-3)


def test_fedavg_is_the_identity_and_needs_nothing_dense(rng: torch.Generator) -> None:
    gradient = torch.randn(4, 3, generator=rng)
    change, moments = FedAvg().step(gradient, {})
    assert torch.equal(change, gradient)
    assert moments == {}
    assert not FedAvg.dense
    assert FedAvgM.dense and FedAdam.dense and FedYogi.dense


def test_fedavgm_without_momentum_is_fedavg(rng: torch.Generator) -> None:
    optimiser = FedAvgM(1.0, 0.0)
    moments: dict[str, torch.Tensor] = {}
    for _ in range(3):
        gradient = torch.randn(4, 3, generator=rng)
        change, moments = optimiser.step(gradient, moments)
        assert torch.equal(change, gradient)


def test_names() -> None:
    assert list(OPTIMISERS) == ["fedavg", "fedavgm", "fedadam", "fedyogi"]
    assert all(name == made.__name__.lower() for name, made in OPTIMISERS.items())


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", True, None])
@pytest.mark.parametrize(
    ("made", "field"),
    [(FedAvgM, "learning_rate"), (FedAdam, "learning_rate"), (FedYogi, "tau")],
)
def test_values_that_must_be_positive(
    made: type[FedAdam], field: str, value: object
) -> None:
    with pytest.raises(InvalidInput) as caught:
        made(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan, "0.9", False])
@pytest.mark.parametrize(
    ("made", "field"), [(FedAvgM, "momentum"), (FedAdam, "beta1"), (FedYogi, "beta2")]
)
def test_values_that_must_be_shares(made: type[FedAdam], field: str, value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        made(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
