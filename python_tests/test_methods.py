"""Every method against its equation in float64."""

from __future__ import annotations

import pytest
import torch
from equations import (
    CONV,
    EMBEDDING,
    SAVED,
    SHAPES,
    Client,
    all_modules,
    as_matrix,
    client,
    exact,
    mixed_round,
    norm_shares,
    one_thread,  # noqa: F401
    optimal_error,
    padded_means,
    shares,
)

import fastagg
from fastagg import methods
from fastagg.errors import InvalidInput

HALF = (torch.bfloat16, torch.float16)
DTYPES = {
    "fp32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "fp16": (torch.float16,),
    "mixed": (torch.bfloat16, torch.float32, torch.float16),
}
# Relative rounding of one stored number of each dtype.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def run(clients: list[Client], method: str, **options: object) -> fastagg.Aggregate:
    return fastagg.aggregate([each.update for each in clients], method, **options)  # type: ignore[arg-type]


def matrix_of(result: fastagg.Aggregate, clients: list[Client], module: str) -> torch.Tensor:
    reference = exact(clients, module)
    return as_matrix(result.delta(module), reference, module == EMBEDDING)


def product(adapter: fastagg.Adapter, module: str) -> torch.Tensor:
    a, b = adapter.factors(module)
    return adapter.scaling(module) * b.double() @ a.double()


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("missing", ["renormalise", "zero"])
@pytest.mark.parametrize("accumulator", ["stack", "dense"])
def test_delta_is_the_exact_weighted_sum(
    seed: int, dtypes: tuple[torch.dtype, ...], missing: str, accumulator: str
) -> None:
    clients = mixed_round(seed, dtypes)
    result = run(clients, "flexlora", missing=missing, accumulator=accumulator)
    assert result.modules == tuple(all_modules(clients))
    for module in result.modules:
        expected = exact(clients, module, missing)
        got = as_matrix(result.delta(module), expected, module == EMBEDDING)
        assert (got - expected).norm() <= 1e-6 * expected.norm(), module


def test_delta_has_the_shape_of_the_base_weight(seed: int) -> None:
    result = run(mixed_round(seed), "flexlora")
    assert result.delta("model.layers.0.mlp.up").shape == (40, 24)
    assert result.delta(EMBEDDING).shape == (30, 12)
    assert result.delta(CONV).shape == (10, 6, 3, 2)
    assert result.delta(CONV).dtype == torch.float32
    with pytest.raises(InvalidInput, match="no client has this module"):
        result.delta("model.layers.9")


def test_hand_computed_scalings_and_shares(seed: int) -> None:
    """alpha / r, alpha / sqrt(r) and a pattern, computed by hand."""
    module = {"layers.0.q_proj": (6, 5)}
    clients = [
        client("plain", 4, alpha=2.0, weight=1, modules=module, seed=seed),
        client("rs", 4, alpha=2.0, weight=3, modules=module, seed=seed + 1, use_rslora=True),
        client("pattern", 4, weight=4, modules=module, seed=seed + 2, alpha=1.0,
               rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5.0}),
    ]
    factor = {"plain": 1 / 8 * 2 / 4, "rs": 3 / 8 * 2 / 2, "pattern": 4 / 8 * 5 / 2}
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for each in clients:
        a, b = each.factors("layers.0.q_proj")
        expected += factor[each.name] * b @ a
    got = run(clients, "flexlora").delta("layers.0.q_proj").double()
    assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("missing", ["renormalise", "zero"])
def test_flora_hands_out_the_exact_stack(
    seed: int, dtypes: tuple[torch.dtype, ...], missing: str
) -> None:
    clients = mixed_round(seed, dtypes)
    stack = run(clients, "flora", missing=missing).stacked()
    assert stack.modules == tuple(all_modules(clients))
    assert stack.dtype == torch.float32
    for module in stack.modules:
        expected = exact(clients, module, missing)
        having = [each for each in clients if module in each.modules]
        assert stack.rank(module) == sum(each.adapter.rank(module) for each in having)
        assert stack.scaling(module) == 1
        got = product(stack, module)
        assert (got - expected).norm() <= 2e-7 * expected.norm()
        # A = [p_1 s_1 A_1; ..] and B = [B_1 ..], in the order of the ids.
        share, row = shares(clients, module, missing), 0
        a, b = (factor.double() for factor in stack.factors(module))
        for each in having:
            a_k, b_k = each.factors(module)
            rank = a_k.shape[0]
            coefficient = share[each.name] * each.adapter.scaling(module)
            assert torch.equal(b[:, row : row + rank], b_k)
            torch.testing.assert_close(a[row : row + rank], coefficient * a_k, rtol=2e-7, atol=0)
            row += rank


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("accumulator", ["stack", "dense"])
def test_flexlora_hands_out_the_best_rank_r_approximation(
    seed: int, dtypes: tuple[torch.dtype, ...], accumulator: str
) -> None:
    clients = mixed_round(seed, dtypes)
    result = run(clients, "flexlora", accumulator=accumulator)
    for each in clients:
        adapter = result.adapter(client=each.name)
        assert adapter.layout.digest == each.adapter.layout.digest
        assert adapter.state_dict().keys() == each.adapter.state_dict().keys()
        assert adapter.config == each.adapter.config
        for module in each.modules:
            dw = exact(clients, module)
            best = optimal_error(dw, each.adapter.rank(module))
            a, _ = adapter.factors(module)
            got = float((product(adapter, module) - dw).norm())
            allowed = 2e-6 + 3 * ROUNDING[a.dtype] * (a.dtype != torch.float32)
            assert got <= best + allowed * float(dw.norm()), (each.name, module)


def test_flexlora_factors_are_v_and_u_s_over_the_own_scaling(seed: int) -> None:
    clients = mixed_round(seed)
    result = run(clients, "flexlora")
    for each in clients:
        adapter = result.adapter(client=each.name)
        for module in each.modules:
            dw = exact(clients, module)
            rank = min(each.adapter.rank(module), *dw.shape)
            a, b = (factor.double() for factor in adapter.factors(module))
            values = torch.linalg.svdvals(dw)[:rank]
            torch.testing.assert_close(
                a[:rank] @ a[:rank].T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5
            )
            scaled = each.adapter.scaling(module) * b
            norms = scaled[:, :rank].norm(dim=0)
            torch.testing.assert_close(norms, values, rtol=0, atol=2e-6 * float(values[0]))
            assert not a[rank:].any()
            assert not b[:, rank:].any()


def test_fedit_averages_the_factors(seed: int) -> None:
    clients = [client(f"c{k}", 8, weight=w, seed=seed + k, special=True)
               for k, w in enumerate((3, 1, 8))]
    result = run(clients, "fedit")
    adapter = result.adapter(client="c1")
    for module in adapter.modules:
        share = shares(clients, module, "renormalise")
        mean_a = sum(share[each.name] * each.factors(module)[0] for each in clients)
        mean_b = sum(share[each.name] * each.factors(module)[1] for each in clients)
        a, b = adapter.factors(module)
        torch.testing.assert_close(a.double(), mean_a, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(b.double(), mean_b, rtol=1e-6, atol=1e-7)
        expected = clients[0].adapter.scaling(module) * mean_b @ mean_a
        torch.testing.assert_close(matrix_of(result, clients, module), expected, rtol=1e-5,
                                   atol=1e-6)


def test_fedit_refuses_unequal_ranks_and_names_zeropad(seed: int) -> None:
    with pytest.raises(InvalidInput, match="zeropad") as caught:
        run([client("a", 8, seed=seed), client("b", 4, seed=seed)], "fedit")
    assert caught.value.client == "b"
    assert caught.value.module in SHAPES
    assert "rank 8" in str(caught.value)
    assert "rank 4" in str(caught.value)


def test_fedit_hands_out_its_one_rank_only(seed: int) -> None:
    result = run([client(f"c{k}", 8, seed=seed + k) for k in range(2)], "fedit")
    assert result.adapter(rank=8).rank("model.layers.0.mlp.up") == 8
    with pytest.raises(InvalidInput, match="zeropad"):
        result.adapter(rank=4)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("missing", ["renormalise", "zero"])
@pytest.mark.parametrize("method", ["zeropad", "hetlora"])
def test_padded_means(
    seed: int, dtypes: tuple[torch.dtype, ...], missing: str, method: str
) -> None:
    clients = mixed_round(seed, dtypes)
    result = run(clients, method, missing=missing)
    for each in clients:
        adapter = result.adapter(client=each.name)
        assert adapter.layout.digest == each.adapter.layout.digest
        for module in each.modules:
            share = norm_shares(clients, module)
            if method == "zeropad":
                share = shares(clients, module, missing)
            mean_a, mean_b = padded_means(clients, module, share)
            a, b = adapter.factors(module)
            rank = a.shape[0]
            tolerance = {"rtol": 1.01 * ROUNDING[a.dtype] + 2e-6, "atol": 1e-6}
            torch.testing.assert_close(a.double(), mean_a[:rank], **tolerance)
            own = mean_b[:, :rank] / each.adapter.scaling(module)
            torch.testing.assert_close(b.double(), own, **tolerance)
    for module in result.modules:
        share = norm_shares(clients, module)
        if method == "zeropad":
            share = shares(clients, module, missing)
        mean_a, mean_b = padded_means(clients, module, share)
        got = as_matrix(result.delta(module), mean_b @ mean_a, module == EMBEDDING)
        torch.testing.assert_close(got, mean_b @ mean_a, rtol=1e-5, atol=1e-6)


def test_hetlora_weighs_by_norms_and_not_by_examples(seed: int) -> None:
    clients = [client("a", 4, weight=1, seed=seed), client("b", 8, weight=1, seed=seed + 1)]
    heavier = [client("a", 4, weight=900, seed=seed), clients[1]]
    same, other = run(clients, "hetlora"), run(heavier, "hetlora")
    for module in same.modules:
        assert torch.equal(same.delta(module), other.delta(module))


def test_hetlora_without_any_update_is_the_plain_mean(seed: int) -> None:
    """In the first round of a LoRA every B is zero, and so is every norm."""
    clients = [client(f"c{k}", 4, seed=seed + k, zero_b=True) for k in range(3)]
    adapter = run(clients, "hetlora").adapter(client="c0")
    for module in adapter.modules:
        mean = sum(each.factors(module)[0] for each in clients) / 3
        a, b = adapter.factors(module)
        torch.testing.assert_close(a.double(), mean, rtol=1e-6, atol=1e-7)
        assert not b.any()


def test_hetlora_leaves_out_clients_of_weight_zero(seed: int) -> None:
    clients = [client("a", 4, seed=seed), client("b", 8, seed=seed + 1, weight=0)]
    alone, both = run(clients[:1], "hetlora"), run(clients, "hetlora")
    for module in alone.modules:
        torch.testing.assert_close(both.delta(module), alone.delta(module), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["flora", "flexlora", "zeropad", "hetlora"])
@pytest.mark.parametrize("missing", ["renormalise", "zero"])
def test_whole_tensors_are_averaged_over_those_that_have_them(
    seed: int, method: str, missing: str
) -> None:
    clients = mixed_round(seed)
    having = [each for each in clients if SAVED in each.adapter.state_dict()]
    total = sum(each.weight for each in having)
    expected = sum(each.weight / total * each.adapter.state_dict()[SAVED].double()
                   for each in having)
    adapter = run(clients, method, missing=missing).adapter(client="c0")
    got = adapter.state_dict()[SAVED].double()
    torch.testing.assert_close(got, expected, rtol=2e-7, atol=1e-9)
    assert "score" in adapter.config.raw["modules_to_save"]


def test_one_client_gets_its_own_update_back(seed: int) -> None:
    only = client("only", 8, seed=seed, special=True)
    for method in methods.names():
        adapter = run([only], method).adapter(client="only")
        for module in only.modules:
            torch.testing.assert_close(
                product(adapter, module), only.delta(module), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", methods.names())
def test_a_method_states_its_paper_and_equation(name: str) -> None:
    method = methods.get(name)
    assert method.name == name
    assert len(method.arxiv.split(".")) == 2
    assert method.paper
    assert "A" in method.equation
    module = __import__(f"fastagg.methods.{name}", fromlist=["METHOD"])
    assert method.arxiv in module.__doc__


def test_the_methods_of_the_first_release_are_there() -> None:
    assert {"flora", "flexlora", "fedit", "zeropad", "hetlora"} <= set(methods.names())


def test_a_method_is_added_by_adding_a_file(tmp_path, monkeypatch, seed: int) -> None:
    (tmp_path / "uniform.py").write_text(
        "from dataclasses import replace\n"
        "from fastagg.methods.flexlora import METHOD as FLEXLORA\n"
        "METHOD = replace(FLEXLORA, name='uniform', arxiv='0000.00000')\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "uniform" in methods.names()
    assert run([client("a", seed=seed)], "uniform").method.name == "uniform"


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="flexlora") as caught:
        fastagg.Aggregator("flexlore")
    assert caught.value.field == "method"
