"""Evaluation against its equations, in float64, and generated answers against known ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from server_rounds import fresh, trained

pytest.importorskip("peft")
pytest.importorskip("rouge_score")

from fastagg.federated.clients.token_loss import TokenLoss
from fastagg.federated.data.examples import Example
from fastagg.federated.data.prompt import TEMPLATES, ByteTokeniser
from fastagg.federated.simulation.evaluation import (
    distance,
    mean_answers,
    perplexity,
    score,
    similarity,
    spectra,
    together,
)


def test_losses_weigh_tokens_alike() -> None:
    whole = together([TokenLoss(6.0, 2), TokenLoss(2.0, 6), TokenLoss(0.0, 0)])
    assert whole.mean == 1.0
    assert perplexity(whole) == math.e
    assert perplexity(TokenLoss(1e6, 1)) == math.inf
    assert math.isnan(perplexity(together([])))


def test_distance_of_a_best_approximation_and_of_a_worse_one() -> None:
    """Eckart and Young: the distance of the truncated SVD is the norm of the tail."""
    adapter = trained(3, names=["a"])[0].update.adapter  # of rank 4
    noise = torch.Generator().manual_seed(0)
    wanted = {}
    for module in adapter.modules:
        own = adapter.delta(module).double()
        wanted[module] = own + 0.1 * torch.randn(
            own.shape, generator=noise, dtype=torch.float64
        ) * float(own.std())
    values = spectra(adapter.modules, wanted.__getitem__)
    found = distance(adapter, wanted.__getitem__, values)
    assert found is not None
    norm = math.sqrt(sum(float(w.square().sum()) for w in wanted.values()))
    errors = [float((adapter.delta(m).double() - w).norm()) for m, w in wanted.items()]
    tails = [
        float((w.flatten(1) - _truncated(w.flatten(1), adapter.rank(m))).norm())
        for m, w in wanted.items()
    ]
    assert found.received == pytest.approx(math.hypot(*errors) / norm, rel=1e-9)
    assert found.optimal == pytest.approx(math.hypot(*tails) / norm, rel=1e-9)
    assert 0 < found.optimal < found.received < 1


def _truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def test_there_is_no_distance_from_nothing() -> None:
    adapter = fresh()["a"]
    values = spectra(adapter.modules, adapter.delta)
    assert distance(adapter, adapter.delta, values) is None


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
