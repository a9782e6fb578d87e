"""Evaluation against its equations, in float64, and generated answers against known ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from adapters import make_adapter, make_config
from equations import SHAPES, one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from server_rounds import delta, fresh, handed, play, target, trained

pytest.importorskip("peft")
pytest.importorskip("rouge_score")

from fastagg.adapter import Adapter
from fastagg.federated.clients.token_loss import TokenLoss
from fastagg.federated.data.examples import Example
from fastagg.federated.data.prompt import TEMPLATES, ByteTokeniser
from fastagg.federated.server.server import Server
from fastagg.federated.simulation.evaluation import (
    Delta,
    Distance,
    compare,
    mean_answers,
    perplexity,
    score,
    similarity,
    together,
)


def test_losses_weigh_tokens_alike() -> None:
    whole = together([TokenLoss(6.0, 2), TokenLoss(2.0, 6), TokenLoss(0.0, 0)])
    assert whole.mean == 1.0
    assert perplexity(whole) == math.e
    assert perplexity(TokenLoss(1e6, 1)) == math.inf
    assert math.isnan(perplexity(together([])))


ACCUMULATORS = [
    ("flora", "auto"),
    ("flexlora", "stack"),
    ("flexlora", "dense"),
    ("fedit", "auto"),
    ("zeropad", "auto"),
    ("hetlora", "auto"),
]


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**31),
    drawn=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    data=st.data(),
)
@pytest.mark.parametrize(("method", "accumulator"), ACCUMULATORS)
def test_spectra_and_distances_of_a_round(
    method: str, accumulator: str, seed: int, drawn: list[int], data: st.DataObject
) -> None:
    """Ranks below and above m and n, modules that some lack, embeddings and convolutions."""
    ranks = dict(zip("abcd", drawn if method != "fedit" else drawn[:1] * len(drawn), strict=False))
    names = st.sets(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=4)
    kinds = {
        name: {
            "modules": {module: SHAPES[module] for module in sorted(data.draw(names))},
            "special": data.draw(st.booleans()),
            "alpha": data.draw(st.sampled_from([-2.0, 0.5, 16.0])),
        }
        for name in ranks
    }
    first = {name: fresh({name: ranks[name]}, **kinds[name])[name] for name in ranks}
    clients = [trained(seed, {name: ranks[name]}, **kinds[name])[0] for name in ranks]
    server = Server(method, first, **({} if accumulator == "auto" else {"accumulator": accumulator}))
    aggregate = play(server, clients).aggregate
    assert aggregate is not None

    def held(module: str) -> Delta:
        return aggregate.factors(module) or aggregate.delta(module)

    received = handed(server)
    spectra, distances = compare(aggregate.modules, held, received)
    exact = {module: target(method, clients, module) for module in aggregate.modules}
    rounding = 1e-13 if (method, accumulator) in ACCUMULATORS[:2] else 1e-5  # of float32 sums
    check_spectra(spectra, exact, rounding)
    if accumulator != "dense":
        for module in exact:
            factors = aggregate.factors(module)
            assert factors is not None
            assert len(spectra[module]) == min(*exact[module].shape, len(factors[0]))
    for name, adapter in received.items():
        check_distance(distances[name], adapter, exact, max(rounding, 1e-9))


def check_spectra(
    spectra: Mapping[str, Sequence[float]], exact: Mapping[str, torch.Tensor], rounding: float
) -> None:
    """Spectra against float64, to a share of the largest value; what a list lacks is zero."""
    assert spectra.keys() == exact.keys()
    for module, wanted in exact.items():
        values = torch.linalg.svdvals(wanted)
        found = torch.zeros_like(values)
        assert len(spectra[module]) <= len(values)
        found[: len(spectra[module])] = torch.tensor(spectra[module], dtype=torch.float64)
        assert (found.diff() <= 0).all()
        assert (found - values).abs().max() <= rounding * values[0]


def check_distance(
    found: Distance | None, adapter: Adapter, exact: Mapping[str, torch.Tensor], rounding: float
) -> None:
    """A distance from dW (m, n) of each module, against float64."""
    norm = math.hypot(*(float(wanted.norm()) for wanted in exact.values()))
    errors, tails = [], []
    for module, wanted in exact.items():
        has = module in adapter.modules
        errors.append(float((delta(adapter, module) - wanted if has else wanted).norm()))
        rank = adapter.rank(module) if has else 0
        tails.append(float(torch.linalg.svdvals(wanted)[rank:].norm()))
    assert found is not None
    assert found.received == pytest.approx(math.hypot(*errors) / norm, rel=rounding, abs=rounding)
    assert found.optimal == pytest.approx(math.hypot(*tails) / norm, rel=rounding, abs=rounding)


def adapter_of(a: torch.Tensor, b: torch.Tensor) -> Adapter:
    """B A as the only module, fc."""
    state = {"base_model.model.fc.lora_A.weight": a, "base_model.model.fc.lora_B.weight": b}
    return Adapter(state, make_config({"fc": (len(b), a.shape[1])}, len(a), alpha=len(a)))


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("rank", [3, 12, 20, 40])  # below, between and beyond m and n
@pytest.mark.parametrize("as_factors", [True, False])
def test_small_distances_are_right(
    step: float, rank: int, as_factors: bool, rng: torch.Generator
) -> None:
    """An adapter that is dW and one term besides, of which all is known."""
    m, n = 24, 16
    a = torch.randn(rank + 1, n, generator=rng)
    b = torch.randn(m, rank + 1, generator=rng)
    b[:, rank] *= step
    received = adapter_of(a, b)
    wanted = a[:rank].double(), b[:, :rank].double()
    whole = wanted[1] @ wanted[0]
    _, found = compare(["fc"], lambda _: wanted if as_factors else whole, {"x": received})
    expected = float(b[:, rank].double().norm() * a[rank].double().norm() / whole.norm())
    assert found["x"] is not None
    assert found["x"].received == pytest.approx(expected, rel=1e-7, abs=1e-13)
    assert found["x"].optimal <= 1e-14


def test_a_best_approximation_is_as_close_as_can_be(rng: torch.Generator) -> None:
    a = torch.randn(30, 80, generator=rng, dtype=torch.float64)
    b = torch.randn(60, 30, generator=rng, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
    best = adapter_of(vt[:8].float(), (u * s)[:, :8].float())
    _, found = compare(["fc"], lambda _: (a, b), {"x": best})
    expected = float(s[8:].norm() / s.norm())
    assert found["x"] is not None
    assert found["x"].optimal == pytest.approx(expected, rel=1e-13)
    assert found["x"].received == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_dense_sum_has_the_shape_of_its_weight(fan_in_fan_out: bool, seed: int) -> None:
    """fan_in_fan_out: GPT-2's Conv1D keeps its weight as (in, out)."""
    extra = {"fan_in_fan_out": fan_in_fan_out}
    one, two = (make_adapter(rank=4, seed=seed + k, config_extra=extra) for k in range(2))
    exact = {module: delta(one, module) for module in one.modules}
    spectra, found = compare(one.modules, one.delta, {"one": one, "two": two})
    check_spectra(spectra, exact, 1e-6)
    check_distance(found["two"], two, exact, 1e-6)
    assert found["one"] is not None and found["one"].received <= 1e-6


def test_there_is_no_distance_from_nothing() -> None:
    adapters = fresh()
    adapter = adapters["a"]
    for held in (adapter.delta, lambda name: tuple(each.double() for each in adapter.factors(name))):
        spectra, found = compare(adapter.modules, held, adapters)
        assert set(found) == set(adapters)
        assert not any(found.values())
        assert not any(value for values in spectra.values() for value in values)


def test_similarity_of_clients_that_did_not_train_is_zero() -> None:
    updates = [each.update for each in trained(5, names=["a", "b"])]
    still = trained(5, names=["c"], zero_b=True)[0].update
    cosines = torch.tensor(similarity([*updates, still]))
    torch.testing.assert_close(cosines.diagonal()[:2], torch.ones(2))
    assert not cosines[2].any()
    flat = [
        torch.cat([u.adapter.delta(m).double().flatten() for m in sorted(u.adapter.modules)])
        for u in updates
    ]
    expected = flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()
    assert float(cosines[0, 1]) == pytest.approx(float(expected), abs=1e-6)


class Parrot(torch.nn.Module):
    """A model that generates what it was told to, as transformers returns it."""

    def __init__(self, says: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"max_position_embeddings": 20})()
        self.says = says
        self.widths: list[int] = []

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        self.widths.append(input_ids.shape[1] + max_new_tokens)
        said = torch.tensor([[*self.says.encode(), ByteTokeniser.end, *b"and on"]])
        return torch.cat([input_ids, said], 1)


@pytest.mark.parametrize(
    ("says", "exact", "rouge"),
    [("two cats", 1.0, 1.0), (" two cats\n", 1.0, 1.0), ("two dogs", 0.0, 0.5), ("", 0.0, 0.0)],
)
def test_answers_are_scored_up_to_their_end(says: str, exact: float, rouge: float) -> None:
    parrot = Parrot(says)
    question = Example("How many, and of what, are there in this house?", "", "two cats")
    scores = score(parrot, [question] * 2, TEMPLATES["plain"], ByteTokeniser(), length=64, new_tokens=8)
    found = mean_answers(scores)
    assert found is not None
    assert (found.exact_match, found.rouge_l) == (exact, rouge)
    assert parrot.widths == [20, 20]  # the prompt is cut so that the answer fits the context


def test_no_answers_have_no_mean() -> None:
    assert mean_answers([]) is None
