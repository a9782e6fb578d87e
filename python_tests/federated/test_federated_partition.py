"""Partitions: every example to one client, in the proportions that the method says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastagg.errors import InvalidInput
from fastagg.federated.data.examples import Example
from fastagg.federated.data.partition import Shares, as_clients, by_label, dirichlet, iid


def labelled(count: int, labels: int = 4) -> list[Example]:
    return [Example("", "", str(i), f"label {i % labels}") for i in range(count)]


def assert_partitions(shares: Shares, examples: list[Example]) -> None:
    assert sorted(int(e.output) for own in shares.values() for e in own) == list(range(len(examples)))
    for own in shares.values():
        assert list(own) == sorted(own, key=lambda e: int(e.output))


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 3))
def test_iid_is_even(clients: int, more: int, seed: int) -> None:
    examples = labelled(clients + more)
    shares = iid(examples, clients, seed=seed)
    assert_partitions(shares, examples)
    assert len(shares) == clients
    assert list(shares) == sorted(shares)
    sizes = [len(own) for own in shares.values()]
    assert max(sizes) - min(sizes) <= 1


def test_iid_mixes_labels() -> None:
    shares = iid(labelled(4000), 4, seed=5)
    for own in shares.values():
        counts = [sum(e.label == f"label {i}" for e in own) for i in range(4)]
        # Hypergeometric: mean 250, deviation 12; six of them.
        assert all(abs(count - 250) < 72 for count in counts)
    assert iid(labelled(4000), 4, seed=5) == shares
    assert iid(labelled(4000), 4, seed=6) != shares


@given(
    st.integers(1, 8), st.integers(1, 5), st.sampled_from([0.05, 0.5, 5.0, 1e4]), st.integers(0, 10**6)
)
def test_dirichlet_partitions(clients: int, labels: int, alpha: float, seed: int) -> None:
    examples = labelled(20 * clients, labels)
    shares = dirichlet(examples, clients, alpha, seed=seed, least=0)
    assert_partitions(shares, examples)
    assert len(shares) == clients
    assert dirichlet(examples, clients, alpha, seed=seed, least=0) == shares


def test_dirichlet_has_the_moments_of_its_distribution() -> None:
    clients, alpha, labels = 5, 0.7, 400
    examples = labelled(100 * labels, labels)
    shares = dirichlet(examples, clients, alpha, seed=0, least=0)
    counts = np.zeros((clients, labels))
    for client, own in enumerate(shares.values()):
        for example in own:
            counts[client, int(str(example.label)[6:])] += 1
    proportions = counts / 100
    # Of one proportion: mean 1/K and variance (K - 1) / (K^2 (K alpha + 1)); cutting adds below 0.01.
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert np.abs(proportions.mean(axis=1) - 1 / clients).max() < 5 * (variance / labels) ** 0.5 + 0.01
    assert abs(proportions.var() / variance - 1) < 0.15


def test_dirichlet_nears_iid_for_large_alpha_and_single_clients_for_small() -> None:
    examples = labelled(4000)
    even = dirichlet(examples, 4, 1e6, seed=0)
    assert all(abs(len(own) - 1000) <= 40 for own in even.values())
    sharp = dirichlet(examples, 4, 1e-4, seed=0, least=0)
    holders = [name for name, own in sharp.items() for e in own if e.label == "label 0"]
    assert len(holders) == 1000 and len(set(holders)) == 1


def test_dirichlet_takes_a_labels_examples_in_random_order() -> None:
    first = dirichlet(labelled(1000, 1), 2, 1e6, seed=0)["client_0"]
    early = sum(int(e.output) < 500 for e in first)
    # Of some 500 of 1,000: hypergeometric, mean 250, deviation 8; six of them.
    assert abs(early - 250) < 48


def test_dirichlet_draws_until_each_client_has_enough() -> None:
    def smallest(least: int) -> int:
        drawn = (dirichlet(labelled(60), 6, 0.3, seed=seed, least=least) for seed in range(20))
        return min(len(own) for shares in drawn for own in shares.values())

    assert smallest(5) >= 5 > smallest(0)
    with pytest.raises(InvalidInput, match="Raise alpha"):
        dirichlet(labelled(60, 2), 6, 1e-5, seed=0)


def test_labels_become_clients_of_file_names() -> None:
    examples = [Example("", "", str(i), label) for i, label in enumerate(["b/c", "a", "b/c"])]
    shares = by_label(examples)
    assert {name: len(own) for name, own in shares.items()} == {"a": 1, "b_c": 2}
    with pytest.raises(InvalidInput, match="two labels"):
        by_label([*examples, Example("", "", "3", "b:c")])
    with pytest.raises(InvalidInput, match="no label"):
        by_label([Example("", "", "x")])


def test_as_clients_holds_out_of_each() -> None:
    shares = iid(labelled(40), 4, seed=0)
    clients = as_clients(shares, 0.2, seed=1)
    assert [client.name for client in clients] == list(shares)
    assert all((len(c.train), len(c.held_out)) == (8, 2) for c in clients)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_requests_are_refused(alpha: float) -> None:
    with pytest.raises(InvalidInput, match="not a concentration"):
        dirichlet(labelled(9), 2, alpha, seed=0)
    with pytest.raises(InvalidInput, match="too few examples for 5 clients"):
        dirichlet(labelled(9), 5, 1.0, seed=0)
    with pytest.raises(InvalidInput, match="too few examples for 10 clients"):
        iid(labelled(9), 10, seed=0)
    with pytest.raises(InvalidInput, match="no clients"):
        iid(labelled(9), 0, seed=0)
