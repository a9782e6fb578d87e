"""Adapters that PEFT trained, aggregated, and loaded back by PEFT: the model's logits decide."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import natural_instructions
import numpy as np
import pytest
import torch
from peft_rounds import (
    CLIENTS,
    Client,
    Deltas,
    Round,
    fine_tune,
    logits,
    lora,
    peft_model,
    peft_parts,
    scenarios,
    train_round,
)

import fastagg

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# float32 factors on disk carry a relative error of 6e-8 each. Logits pass through float32 norms.
DELTA_TOLERANCE = 4e-7
LOGITS_TOLERANCE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost models this small more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=scenarios())
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Round:
    scenario = scenarios()[request.param]
    return train_round(scenario, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Round:
    return train_round(scenarios()["plain"], tmp_path_factory.mktemp("plain"))


def distance(got: Deltas, expected: Deltas) -> float:
    """Frobenius norm of the difference over all modules, relative."""
    assert got.keys() == expected.keys()
    error = sum(float((got[m].double() - expected[m]).square().sum()) for m in expected)
    return math.sqrt(error / sum(float(e.square().sum()) for e in expected.values()))


def assert_same_logits(got: torch.Tensor, expected: torch.Tensor, without: torch.Tensor) -> None:
    """Equal within a fraction of what the update changes at all."""
    change = float((expected - without).abs().max())
    assert change > 0.05, "the update changes nothing that a test could see"
    assert float((got - expected).abs().max()) <= LOGITS_TOLERANCE * change


def truncated(delta: Deltas, ranks: dict[str, int]) -> Deltas:
    """The best approximation at each module's rank, by numpy's SVD in float64."""
    best = {}
    for module, rank in ranks.items():
        u, s, vt = np.linalg.svd(delta[module].numpy(), full_matrices=False)
        best[module] = torch.from_numpy((u[:, :rank] * s[:rank]) @ vt[:rank])
    return best


def test_clients_learnt_something_of_full_rank(trained: Round) -> None:
    for client in trained.clients:
        for module, delta in client.deltas.items():
            assert int(torch.linalg.matrix_rank(delta)) == client.ranks[module]


def test_floras_stack_loaded_as_an_adapter_is_the_exact_update(trained: Round, tmp_path: Path) -> None:
    fastagg.aggregate(trained.updates, method="flora").stacked().save(tmp_path / "stacked")
    model = peft_model(trained.base, tmp_path / "stacked")
    deltas, ranks, saved = peft_parts(model)
    for module, rank in ranks.items():
        assert rank == sum(c.ranks.get(module, 0) for c in trained.clients)
    assert distance(deltas, trained.delta) <= DELTA_TOLERANCE
    assert saved.keys() == trained.saved.keys()
    assert_same_logits(
        logits(model, trained.probe),
        trained.logits_with(trained.delta, trained.saved),
        logits(trained.base, trained.probe),
    )


def test_floras_stack_merged_into_the_live_base(trained: Round) -> None:
    result = fastagg.aggregate(trained.updates, method="flora")
    merged = copy.deepcopy(trained.base)
    result.merge_into(merged)
    assert_same_logits(
        logits(merged, trained.probe),
        trained.logits_with(trained.delta, trained.saved),
        logits(trained.base, trained.probe),
    )


def test_delta_has_the_shape_of_the_base_weight(trained: Round) -> None:
    result = fastagg.aggregate(trained.updates, method="flexlora")
    deltas = {module: result.delta(module) for module in trained.delta}
    for module, delta in deltas.items():
        assert delta.shape == trained.base.get_submodule(module).weight.shape
    assert distance(deltas, trained.delta) <= DELTA_TOLERANCE


def test_flexlora_at_full_rank_is_exact(trained: Round, tmp_path: Path) -> None:
    result = fastagg.aggregate(trained.updates, method="flexlora")
    result.adapter(rank=trained.stack_rank).save(tmp_path / "full")
    model = peft_model(trained.base, tmp_path / "full")
    assert distance(peft_parts(model)[0], trained.delta) <= DELTA_TOLERANCE
    assert_same_logits(
        logits(model, trained.probe),
        trained.logits_with(trained.delta, trained.saved),
        logits(trained.base, trained.probe),
    )


@pytest.mark.parametrize("index", range(len(CLIENTS)))
def test_flexlora_gives_each_client_the_best_of_its_ranks(
    trained: Round, index: int, tmp_path: Path
) -> None:
    client = trained.clients[index]
    result = fastagg.aggregate(trained.updates, method="flexlora")
    result.adapter(client=client.name).save(tmp_path / "own")
    model = peft_model(trained.base, tmp_path / "own")
    deltas, ranks, _ = peft_parts(model)
    assert ranks == client.ranks
    best = truncated(trained.delta, client.ranks)
    assert distance(deltas, best) <= DELTA_TOLERANCE
    assert_same_logits(
        logits(model, trained.probe),
        trained.logits_with(best, trained.saved),
        logits(trained.base, trained.probe),
    )


def test_own_scalings_survive_in_the_clients_own_configuration(trained: Round, tmp_path: Path) -> None:
    result = fastagg.aggregate(trained.updates, method="flexlora")
    for client in trained.clients:
        own = fastagg.Adapter.load(client.folder)
        back = result.adapter(client=client.name)
        assert {m: back.scaling(m) for m in back.modules} == pytest.approx(
            {m: own.scaling(m) for m in own.modules}, rel=1e-12
        )
        assert back.dtype == own.dtype


def factors(client: Client) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (r, n) and s B (m, r) in float64."""
    adapter = fastagg.Adapter.load(client.folder)
    return {
        module: (
            adapter.factors(module)[0].double(),
            adapter.scaling(module) * adapter.factors(module)[1].double(),
        )
        for module in adapter.modules
    }


def averaged_factors(clients: list[Client], weigh: Callable[[Client, str], float], rank: int) -> Deltas:
    """(sum_k p_k pad(s_k B_k)) (sum_k p_k pad(A_k)) of the first ``rank`` rows, in float64.

    ``weigh`` gives a client's weight in a module; p_k is its share.
    """
    each = [factors(client) for client in clients]
    deltas = {}
    for module, (a0, b0) in each[0].items():
        weights = [weigh(client, module) for client in clients]
        largest = max(owned[module][0].shape[0] for owned in each)
        a_mean = torch.zeros(largest, a0.shape[1], dtype=torch.float64)
        b_mean = torch.zeros(b0.shape[0], largest, dtype=torch.float64)
        for weight, owned in zip(weights, each, strict=True):
            a, b = owned[module]
            a_mean[: a.shape[0]] += weight / sum(weights) * a
            b_mean[:, : a.shape[0]] += weight / sum(weights) * b
        deltas[module] = b_mean[:, :rank] @ a_mean[:rank]
    return deltas


def by_examples(client: Client, module: str) -> float:
    return float(client.weight)


def by_norm(client: Client, module: str) -> float:
    return float(client.deltas[module].norm())


@pytest.mark.parametrize(("method", "weigh"), [("zeropad", by_examples), ("hetlora", by_norm)])
def test_padding_hands_out_its_own_equation_and_not_the_exact_update(
    plain: Round, method: str, weigh: Callable[[Client, str], float], tmp_path: Path
) -> None:
    result = fastagg.aggregate(plain.updates, method=method)
    for client in plain.clients:
        rank = max(client.ranks.values())
        result.adapter(client=client.name).save(tmp_path / client.name)
        model = peft_model(plain.base, tmp_path / client.name)
        expected = averaged_factors(plain.clients, weigh, rank)
        assert distance(peft_parts(model)[0], expected) <= DELTA_TOLERANCE
        assert distance(expected, plain.delta) > 0.1
        assert_same_logits(
            logits(model, plain.probe),
            plain.logits_with(expected, {}),
            logits(plain.base, plain.probe),
        )


def test_fedit_averages_equal_ranks_and_refuses_unequal_ones(plain: Round, tmp_path: Path) -> None:
    with pytest.raises(fastagg.InvalidInput, match="zeropad"):
        fastagg.aggregate(plain.updates, method="fedit")

    config = lora(4)
    for seed, client in enumerate(CLIENTS[:2]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            texts = natural_instructions.read(client).train
            fine_tune(plain.base, config, texts, tmp_path / client, embeds=False)
    equal = [
        Client(name, tmp_path / name, weight, *peft_parts(peft_model(plain.base, tmp_path / name)))
        for name, weight in zip(CLIENTS[:2], (3, 1), strict=True)
    ]
    updates = [fastagg.ClientUpdate.load(c.folder, weight=c.weight) for c in equal]
    fastagg.aggregate(updates, method="fedit").adapter(rank=4).save(tmp_path / "mean")
    model = peft_model(plain.base, tmp_path / "mean")
    expected = averaged_factors(equal, by_examples, 4)
    assert distance(peft_parts(model)[0], expected) <= DELTA_TOLERANCE
    assert_same_logits(
        logits(model, plain.probe),
        plain.logits_with(expected, {}),
        logits(plain.base, plain.probe),
    )


@pytest.mark.parametrize("trained", ["embedding"], indirect=True)
def test_modules_to_save_arrive_as_their_weighted_mean(trained: Round, tmp_path: Path) -> None:
    result = fastagg.aggregate(trained.updates, method="flexlora")
    result.adapter(client=CLIENTS[2]).save(tmp_path / "own")
    _, _, saved = peft_parts(peft_model(trained.base, tmp_path / "own"))
    assert saved.keys() == trained.saved.keys() == {"lm_head.weight"}
    for name, value in trained.saved.items():
        assert float((saved[name] - value).abs().max()) <= 1e-7 * float(value.abs().max())
        assert float((value - trained.base.get_parameter(name).detach()).abs().max()) > 1e-3
