"""Ranks: the schemes' own numbers, and what PEFT and AdamW make of them."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastagg.errors import InvalidInput
from fastagg.federated.clients.llama import Shape, new_llama
from fastagg.federated.clients.ranks import (
    FEED_FORWARD,
    FLEXLORA_TYPES,
    SHARES,
    ClientRanks,
    Distribution,
    adapter_bytes,
    by_memory,
    distributed,
    each,
    flora,
)
from fastagg.peft_format.config import AdapterConfig


def named(count: int) -> list[str]:
    return [f"c{i}" for i in range(count)]


def test_a_list_is_one_for_each_or_one_for_all() -> None:
    assert each([4, 8], named(2)) == {"c0": ClientRanks(4), "c1": ClientRanks(8)}
    assert each([4], named(3)) == dict.fromkeys(named(3), ClientRanks(4))
    for ranks in ([], [4, 8]):
        with pytest.raises(InvalidInput, match="3 ranks, or one for all"):
            each(ranks, named(3))
    with pytest.raises(InvalidInput, match="not a rank"):
        each([0], named(1))


def test_floras_list_repeats() -> None:
    ten = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
    assert [r.rank for r in flora(named(10)).values()] == ten
    assert [r.rank for r in flora(named(16)).values()] == ten + ten[:6]
    assert [r.rank for r in flora(named(3)).values()] == ten[:3]


@pytest.mark.parametrize(
    ("distribution", "counts"),
    [
        ("uniform", (25, 25, 25, 25)),
        # The density of N(1.5, 0.7) at 0, 1, 2 and 3.
        ("normal", (6, 44, 44, 6)),
        ("heavy-tail-light", (85, 5, 5, 5)),
        ("heavy-tail-strong", (5, 5, 5, 85)),
    ],
)
def test_distributions_are_met_to_a_client(distribution: Distribution, counts: tuple[int, ...]) -> None:
    given_out = distributed(distribution, named(100), seed=0)
    assert list(given_out) == named(100)
    found = [sum(ranks is kind for ranks in given_out.values()) for kind in FLEXLORA_TYPES]
    assert found == list(counts)


def test_types_are_flexloras() -> None:
    assert [kind.rank for kind in FLEXLORA_TYPES] == [8, 30, 30, 200]
    assert [kind.pattern for kind in FLEXLORA_TYPES] == [{}, {}, {FEED_FORWARD: 200}, {}]


@given(st.sampled_from(sorted(SHARES)), st.integers(0, 200), st.integers(0, 2**40))
def test_every_number_of_clients_is_within_one_of_the_distribution(
    distribution: Distribution, clients: int, seed: int
) -> None:
    given_out = distributed(distribution, named(clients), seed=seed)
    assert len(given_out) == clients
    for kind, share in zip(FLEXLORA_TYPES, SHARES[distribution], strict=True):
        assert abs(sum(ranks is kind for ranks in given_out.values()) - share * clients) < 1 + 1e-9


def test_who_has_which_type_is_drawn() -> None:
    first, again, other = (distributed("uniform", named(40), seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert Counter(r.rank for r in first.values()) == Counter(r.rank for r in other.values())
    small = [ClientRanks(i) for i in (1, 2, 3, 4)]
    mixed = distributed("uniform", named(8), seed=0, types=small)
    assert sorted(r.rank for r in mixed.values()) == [1, 1, 2, 2, 3, 3, 4, 4]
    with pytest.raises(InvalidInput, match="types"):
        distributed("uniform", named(8), seed=0, types=small[:3])
    with pytest.raises(InvalidInput, match="heavy-tail-light"):
        distributed("pareto", named(8), seed=0)  # type: ignore[arg-type]


def test_peft_gives_each_kind_of_module_its_rank_and_a_scaling_of_two() -> None:
    from peft import LoraConfig, get_peft_model

    fields = FLEXLORA_TYPES[2].lora_fields()
    base = new_llama(Shape(16, 16, 2, 2), length=16, seed=0)
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(base, LoraConfig(target_modules="all-linear", **fields))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == 14
    ours = AdapterConfig.from_dict({"peft_type": "LORA", **fields})
    for name, layer in layers.items():
        rank = 200 if ".mlp." in name else 30
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == 2
        module = name.removeprefix("base_model.model.")
        assert (ours.rank_of(module), ours.scaling_of(module)) == (rank, 2)


@pytest.mark.parametrize(
    ("module", "inside"),
    [
        ("model.layers.0.mlp.down_proj", True),
        ("transformer.h.0.mlp.c_proj", True),
        ("transformer.h.0.attn.c_proj", False),
        ("model.layers.0.self_attn.q_proj", False),
        ("model.layers.0.block_sparse_moe.experts.3.w1", True),
        ("model.decoder.layers.0.fc1", True),
        ("model.decoder.layers.0.self_attn.out_proj", False),
        ("lm_head", False),
    ],
)
def test_feed_forward_modules_are_known_by_name(module: str, inside: bool) -> None:
    config = AdapterConfig.from_dict({"peft_type": "LORA", "r": 1, "rank_pattern": {FEED_FORWARD: 2}})
    assert config.rank_of(module) == 1 + inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_that_adamw_holds(dtype: torch.dtype) -> None:
    shapes = {"q": (6, 10), "up": (14, 6)}
    factors = [
        torch.nn.Parameter(torch.ones(size, dtype=dtype))
        for m, n in shapes.values()
        for size in ((3, n), (m, 3))
    ]
    optimiser = torch.optim.AdamW(factors)
    sum(factor.sum() for factor in factors).backward()
    optimiser.step()
    held = [f for factor in factors for f in (factor, factor.grad)]
    held += [s for state in optimiser.state.values() for s in state.values() if s.ndim]
    assert adapter_bytes(3, shapes, dtype) == sum(t.nbytes for t in held)


sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@given(
    st.dictionaries(st.text(), sizes, min_size=1, max_size=5),
    st.lists(st.integers(1, 10**7), min_size=1, max_size=4),
)
def test_memory_gives_the_largest_rank_that_fits(
    shapes: dict[str, tuple[int, int]], budgets: list[int]
) -> None:
    one = adapter_bytes(1, shapes)
    clients = named(len(budgets))
    if min(budgets) < one:
        with pytest.raises(InvalidInput, match=f"at least {one} bytes") as caught:
            by_memory(budgets, clients, shapes)
        assert caught.value.client == f"c{next(i for i, b in enumerate(budgets) if b < one)}"
        return
    full = max(min(shape) for shape in shapes.values())
    for budget, ranks in zip(budgets, by_memory(budgets, clients, shapes).values(), strict=True):
        assert adapter_bytes(ranks.rank, shapes) <= budget
        assert ranks.rank == full or adapter_bytes(ranks.rank + 1, shapes) > budget


def test_memory_needs_a_budget_for_each_and_modules() -> None:
    assert by_memory([10**6], named(2), {"q": (8, 8)}) == dict.fromkeys(named(2), ClientRanks(8))
    with pytest.raises(InvalidInput, match="2 budgets, or one for all"):
        by_memory([1, 2, 3], named(2), {"q": (8, 8)})
    with pytest.raises(InvalidInput, match="no module"):
        by_memory([1], named(2), {})


def test_alpha_is_twice_the_rank_or_what_is_asked_for() -> None:
    ranks = ClientRanks(3, {"mlp": 5})
    assert ranks.lora_fields() == {
        "r": 3,
        "lora_alpha": 6,
        "rank_pattern": {"mlp": 5},
        "alpha_pattern": {"mlp": 10},
    }
    assert math.isclose(ranks.lora_fields(0.5)["alpha_pattern"]["mlp"], 2.5)
    with pytest.raises(InvalidInput, match="mlp"):
        ClientRanks(3, {"mlp": 0})
