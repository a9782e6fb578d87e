"""What an Aggregate hands out: adapters by rank and by client, the stack, merged base weights."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapters import make_adapter, same_bits
from equations import (
    CONV,
    EMBEDDING,
    SAVED,
    SHAPES,
    Client,
    client,
    exact,
    mixed_round,
    one_thread,  # noqa: F401
    optimal_error,
)
from torch import nn

import fastagg
from fastagg import methods
from fastagg.errors import InvalidInput, MemoryBudgetExceeded
from fastagg.handouts.choices import Settings

UP = "model.layers.0.mlp.up"


def run(clients: list[Client], method: str = "flexlora", **options: object) -> fastagg.Aggregate:
    return fastagg.aggregate([each.update for each in clients], method, **options)  # type: ignore[arg-type]


def product(adapter: fastagg.Adapter, module: str) -> torch.Tensor:
    a, b = adapter.factors(module)
    return adapter.scaling(module) * b.double() @ a.double()


# By rank


@pytest.mark.parametrize("rank", [1, 5, 16, 40])
@pytest.mark.parametrize("accumulator", ["stack", "dense"])
def test_any_rank_is_the_best_of_its_rank(seed: int, rank: int, accumulator: str) -> None:
    clients = mixed_round(seed)
    result = run(clients, accumulator=accumulator)
    adapter = result.adapter(rank=rank)
    assert adapter.modules == result.modules
    for module in adapter.modules:
        dw = exact(clients, module)
        assert adapter.rank(module) == rank
        error = float((product(adapter, module) - dw).norm())
        assert error <= optimal_error(dw, rank) + 2e-6 * float(dw.norm())


def test_a_rank_does_not_depend_on_what_was_asked_before(seed: int) -> None:
    clients = mixed_round(seed)
    fresh = run(clients).adapter(rank=4).flat
    result = run(clients)
    result.adapter(client="c2")
    result.adapter(rank=16)
    assert torch.equal(result.adapter(rank=4).flat, fresh)
    assert torch.equal(result.adapter(client="c0").flat, run(clients).adapter(client="c0").flat)


def test_the_scaling_is_the_clients_where_they_agree(seed: int) -> None:
    agreeing = [client("a", 4, seed=seed), client("b", 8, seed=seed)]  # alpha = 2 r
    adapter = run(agreeing).adapter(rank=6)
    assert {adapter.scaling(module) for module in adapter.modules} == {2.0}
    assert adapter.config.raw["lora_alpha"] == 12
    odd = client("c", 8, seed=seed, alpha_pattern={"up": 1.0})
    mixed = run([*agreeing, odd]).adapter(rank=6)
    assert {module: mixed.scaling(module) for module in mixed.modules} == {
        module: 1.0 if module.endswith("up") else 2.0 for module in SHAPES
    }


def test_dtypes_of_hand_outs(seed: int) -> None:
    half = [client(f"c{k}", 4, seed=seed + k, dtype=torch.bfloat16) for k in range(2)]
    assert run(half).adapter(rank=2).dtype == torch.bfloat16
    mixed = [*half, client("c2", 4, seed=seed, dtype=torch.float16)]
    assert run(mixed).adapter(rank=2).dtype == torch.float32
    assert run(mixed).adapter(client="c2").dtype == torch.float16
    for dtype in (torch.float16, "float16"):
        result = run(mixed, dtype=dtype)
        assert result.adapter(rank=2).dtype == torch.float16
        own = result.adapter(client="c0")
        assert own.dtype == torch.float16
        assert own.state_dict().keys() == mixed[0].adapter.state_dict().keys()
        assert run(mixed, "flora", dtype=dtype).stacked().dtype == torch.float16


def test_a_number_that_does_not_fit_is_refused(seed: int) -> None:
    big = client("big", 4, seed=seed, dtype=torch.float16)
    for key, tensor in big.adapter.state_dict().items():
        tensor.mul_(300 if "lora_A" in key else 200)
    for method in ("flexlora", "flora"):
        result = run([big], method, dtype=torch.float16)
        if method == "flora":
            result.adapter(client="big")  # the factors as they came still fit
            continue
        with pytest.raises(InvalidInput, match="does not fit into float16") as caught:
            result.adapter(client="big")
        assert caught.value.module in SHAPES
        assert "bfloat16" in str(caught.value)
    assert run([big], dtype=torch.bfloat16).adapter(client="big").check_finite() is None


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_what_is_no_rank_is_refused(seed: int, rank: object) -> None:
    with pytest.raises(InvalidInput, match="not a rank"):
        run([client("a", seed=seed)]).adapter(rank=rank)  # type: ignore[arg-type]


def test_rank_or_client_but_not_both(seed: int) -> None:
    result = run([client("a", seed=seed)])
    adapter = client("b", seed=seed).adapter
    for arguments in ({}, {"rank": 4, "client": "a"}, {"client": "a", "like": adapter}):
        with pytest.raises(InvalidInput, match="which adapter"):
            result.adapter(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="no such client") as caught:
        result.adapter(client="b")
    assert "a" in str(caught.value)


# By client


def test_a_client_keeps_its_prefix_and_its_configuration(seed: int) -> None:
    clients = [
        client("plain", 4, seed=seed),
        client("nvflare", 8, seed=seed + 1, prefix="model.base_model.model.", saved=True),
    ]
    result = run(clients, dtype=torch.bfloat16)
    adapter = result.adapter(client="nvflare")
    assert adapter.state_dict().keys() == clients[1].adapter.state_dict().keys()
    assert all(key.startswith("model.base_model.") for key in adapter.state_dict())
    assert adapter.config == clients[1].adapter.config
    assert SAVED in {"base_model.model." + key.split("base_model.model.")[1]
                     for key in adapter.state_dict()}


# By an adapter


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_adapter_like_a_clients_gets_the_bits_of_the_client(
    seed: int, method: str, dtype: torch.dtype | None
) -> None:
    clients = [client(f"c{k}", 4 if method == "fedit" else 4 + k, seed=seed + k, special=True,
                      saved=True, prefix="x.base_model.model.") for k in range(3)]
    result = run(clients, method, dtype=dtype)
    for number, each in enumerate(clients):
        like = client("other", each.adapter.config.rank, seed=seed + 9, special=True, saved=True,
                      prefix="x.base_model.model.").adapter
        got, expected = result.adapter(like=like), result.adapter(client=each.name)
        assert same_bits(got.state_dict(), expected.state_dict()), number
        assert got.config == expected.config
        assert same_bits(result.adapter(like=each.adapter).state_dict(), expected.state_dict())


@pytest.mark.parametrize("method", ["flexlora", "zeropad"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_like_keeps_what_the_round_lacks(
    seed: int, method: str, dtype: torch.dtype | None
) -> None:
    up = {UP: SHAPES[UP]}
    result = run([client("a", 4, seed=seed, modules=up)], method, dtype=dtype)
    like = client("b", 9, seed=seed + 1, saved=True, special=True).adapter
    got = result.adapter(like=like)
    assert got.modules == like.modules
    for key, tensor in like.state_dict().items():
        kept = UP not in key
        assert torch.equal(got.state_dict()[key], tensor.to(dtype or tensor.dtype)) == kept
    slack = 2e-6 if dtype is None else 2e-2
    dw = exact([client("a", 4, seed=seed, modules=up)], UP)
    assert (product(got, UP) - dw).norm() <= slack * dw.norm()
    alone = client("c", 3, seed=seed + 2, modules={"model.other.q_proj": (6, 5)}).adapter
    assert same_bits(
        result.adapter(like=alone).state_dict(),
        {key: tensor.to(dtype or tensor.dtype) for key, tensor in alone.state_dict().items()},
    )


def test_like_must_fit_to_the_round(seed: int) -> None:
    result = run([client("a", 4, seed=seed)])
    taller = client("a", 4, modules={UP: (41, 24)}).adapter
    with pytest.raises(InvalidInput, match="another shape") as caught:
        result.adapter(like=taller)
    assert caught.value.module == UP
    with pytest.raises(InvalidInput, match="different base models"):
        result.adapter(like=client("a", 4, base_model="other").adapter)
    with pytest.raises(InvalidInput, match="cannot mix ranks"):
        run([client("a", 4, seed=seed)], "fedit").adapter(like=client("b", 8).adapter)


# The stack


def test_flexlora_gives_its_stack_too(seed: int) -> None:
    clients = mixed_round(seed)
    stack = run(clients).stacked()
    flora = run(clients, "flora")
    assert torch.equal(stack.flat, flora.stacked().flat)
    assert torch.equal(stack.flat, flora.adapter(client="c3").flat)
    assert stack.config.raw["lora_alpha"] == stack.config.raw["r"]


def test_there_is_no_stack_of_sums(seed: int) -> None:
    clients = [client("a", seed=seed)]
    with pytest.raises(InvalidInput, match="accumulator='stack'"):
        run(clients, accumulator="dense").stacked()
    for method in ("fedit", "zeropad", "hetlora"):
        with pytest.raises(InvalidInput, match="flora"):
            run(clients, method).stacked()


def test_flora_hands_out_no_rank(seed: int) -> None:
    with pytest.raises(InvalidInput, match="flexlora"):
        run([client("a", seed=seed)], "flora").adapter(rank=4)


def test_each_method_says_what_happens_to_the_base(seed: int) -> None:
    clients = [client("a", seed=seed)]
    assert "merges the stack" in run(clients, "flora").base_effect
    assert run(clients, "flexlora").base_effect.startswith("none")
    assert run(clients, "flora").report.base_effect == run(clients, "flora").base_effect


def test_the_report_after_a_hand_out(seed: int) -> None:
    clients = mixed_round(seed)
    result = run(clients)
    before = result.report
    assert [each.client for each in before.clients] == [each.name for each in clients]
    assert all(module.route is None for module in before.modules)
    assert before.bytes_read == sum(each.adapter.layout.nbytes for each in clients)
    for each in clients:
        result.adapter(client=each.name)
    report = result.report
    for module in report.modules:
        having = [each for each in clients if module.module in each.modules]
        assert module.clients == len(having)
        ranks = {each.adapter.rank(module.module) for each in having}
        assert module.rank_sum == sum(each.adapter.rank(module.module) for each in having)
        assert set(module.kept) == ranks
        values = torch.linalg.svdvals(exact(clients, module.module)).square()
        for rank, share in module.kept.items():
            assert share == pytest.approx(float(values[:rank].sum() / values.sum()), abs=1e-6)
        assert module.norm == pytest.approx(float(values.sum().sqrt()), rel=1e-6)
        assert module.numerical_rank == int((values.sqrt() > 1e-6 * values[0].sqrt()).sum())
        assert 0 <= module.certificate < 1e-3
        assert module.seconds > 0
    assert report.seconds["svd"] > 0
    assert report.peak_memory > 0
    again = type(report).from_json(report.to_json())
    assert again == report
    with pytest.raises(ValueError, match="schema"):
        type(report).from_dict({**report.to_dict(), "schema": 99})


def test_shares_kept_of_first_rows(seed: int) -> None:
    clients = [client("a", 4, seed=seed), client("b", 12, seed=seed + 1)]
    result = run(clients, "zeropad")
    result.adapter(client="a")
    adapter = run(clients, "zeropad", dtype=torch.float32).adapter(rank=12)
    for module in result.report.modules:
        a, b = (factor.double() for factor in adapter.factors(module.module))
        lost = (b[:, 4:] @ a[4:]).norm() / (b @ a).norm()
        assert module.kept[4] == pytest.approx(1 - float(lost) ** 2, abs=1e-6)


# Memory


def test_hand_outs_obey_the_budget(seed: int, tmp_path) -> None:
    clients = [client(f"c{k}", 16, seed=seed + k) for k in range(6)]
    updates = [each.update for each in clients]
    with pytest.raises(MemoryBudgetExceeded) as caught:
        fastagg.aggregate(updates, max_memory=2000, accumulator="stack")
    result = fastagg.aggregate(updates, max_memory=caught.value.needed, accumulator="stack")
    with pytest.raises(MemoryBudgetExceeded, match="save") as refused:
        result.adapter(client="c0")
    result.save(tmp_path / "out")
    enough = fastagg.aggregate(updates, max_memory=refused.value.needed, accumulator="stack")
    expected = run(clients).adapter(client="c0")
    assert torch.equal(enough.adapter(client="c0").flat, expected.flat)


# Into the base


class Model(nn.Module):
    """The modules of SHAPES, an embedding, a Conv2d and a classifier."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.model.layers:
            layer.attn, layer.mlp = nn.Module(), nn.Module()
            layer.attn.q_proj = nn.Linear(16, 24, bias=False)
            layer.attn.v_proj = nn.Linear(16, 8)
            layer.mlp.up = nn.Linear(24, 40)
        self.model.embed_tokens = nn.Embedding(30, 12)
        self.model.patch = nn.Conv2d(6, 10, (3, 2))
        self.score = nn.Linear(24, 5, bias=False)
        self.to(dtype)


def expected_weights(
    before: dict[str, torch.Tensor], clients: list[Client], result: fastagg.Aggregate
) -> dict[str, torch.Tensor]:
    expected = {name: weight.double() for name, weight in before.items()}
    for module in result.modules:
        dw = exact(clients, module)
        dw = dw.T if module == EMBEDDING else dw
        expected[f"{module}.weight"] += dw.reshape(expected[f"{module}.weight"].shape)
    having = [each for each in clients if SAVED in each.adapter.state_dict()]
    total = sum(each.weight for each in having)
    expected["score.weight"] = sum(
        each.weight / total * each.adapter.state_dict()[SAVED].double() for each in having
    )
    return expected


@pytest.mark.parametrize("method", ["flora", "flexlora"])
@pytest.mark.parametrize("accumulator", ["auto", "dense"])
@pytest.mark.parametrize(("dtype", "rounding"), [
    (torch.float32, 2**-20), (torch.bfloat16, 2**-8), (torch.float16, 2**-11),
    (torch.float64, 2**-20),
])
def test_merging_into_a_model(
    seed: int, method: str, accumulator: str, dtype: torch.dtype, rounding: float
) -> None:
    if (method, accumulator) == ("flora", "dense"):
        pytest.skip("flora keeps the stack")
    torch.manual_seed(seed)
    clients, model = mixed_round(seed), Model(dtype)
    result = run(clients, method, accumulator=accumulator)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    versions = {name: weight._version for name, weight in model.named_parameters()}
    result.merge_into(model)
    expected = expected_weights(before, clients, result)
    for name, weight in model.state_dict().items():
        scale = max(1.0, float(expected[name].abs().max()))
        assert ((weight.double() - expected[name]).abs() <= 1.01 * rounding * scale).all(), name
        assert weight.dtype == dtype
    touched = [*(f"{module}.weight" for module in result.modules), "score.weight"]
    for name, parameter in model.named_parameters():
        assert (parameter._version > versions[name]) == (name in touched)


def test_merging_into_a_dict_and_into_views(seed: int) -> None:
    clients, model = mixed_round(seed), Model()
    result = run(clients)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = expected_weights(before, clients, result)
    strided = {name: weight.repeat_interleave(2, -1)[..., ::2] for name, weight in before.items()}
    prefixed = {f"base_model.model.{name}": weight for name, weight in strided.items()}
    for base in (before, prefixed):
        result.merge_into(base)
        for name, weight in base.items():
            torch.testing.assert_close(
                weight.double(), expected[name.removeprefix("base_model.model.")],
                rtol=1e-5, atol=1e-5,
            )


def test_merging_the_means(seed: int) -> None:
    clients = [client(f"c{k}", rank, seed=seed + k) for k, rank in enumerate((4, 8))]
    model = Model()
    before = model.model.layers[0].mlp.up.weight.detach().clone()
    result = run(clients, "zeropad")
    result.merge_into(model)
    torch.testing.assert_close(
        model.model.layers[0].mlp.up.weight - before, result.delta(UP), rtol=1e-4, atol=1e-5
    )


def test_a_stored_transpose(seed: int) -> None:
    """GPT-2's Conv1D keeps its weight (in, out): fan_in_fan_out."""
    adapter = make_adapter({"h.0.c_attn": (12, 4)}, rank=3, seed=seed, name="gpt",
                           config_extra={"fan_in_fan_out": True})
    only = Client("gpt", 1.0, adapter)
    result = run([only])
    dw = exact([only], "h.0.c_attn")
    assert result.delta("h.0.c_attn").shape == (4, 12)
    base = {"h.0.c_attn.weight": torch.zeros(4, 12)}
    result.merge_into(base)
    torch.testing.assert_close(base["h.0.c_attn.weight"].T.double(), dw, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda base: base.pop(f"{CONV}.weight"), "no tensor for this module"),
    (lambda base: base.update({f"{CONV}.weight": torch.zeros(10, 6, 3, 3)}), "shape"),
    (lambda base: base.update({f"{CONV}.weight": torch.zeros(10, 6, 3, 2, dtype=torch.int8)}),
     "floating point"),
    (lambda base: base.update({f"{CONV}.weight": torch.zeros(10, 6, 3, 2, device="meta")}),
     "no data"),
    (lambda base: base.update({"score.weight": torch.zeros(5, 25)}), "shape"),
    (lambda base: base.pop("score.weight"), "score"),
], ids=["missing", "shape", "quantised", "meta", "whole-shape", "whole-missing"])
def test_nothing_is_changed_unless_all_of_it_fits(
    seed: int, spoil: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    result = run(mixed_round(seed))
    base = {name: weight.clone() for name, weight in Model().state_dict().items()}
    spoil(base)
    before = {name: weight.clone() for name, weight in base.items()}
    with pytest.raises(InvalidInput, match=message):
        result.merge_into(base)
    for name, weight in base.items():
        assert weight.is_meta or torch.equal(weight, before[name])


def test_what_is_no_base_is_refused(seed: int) -> None:
    with pytest.raises(InvalidInput, match="not a base model"):
        run([client("a", seed=seed)]).merge_into([torch.zeros(2)])  # type: ignore[arg-type]


def test_an_initialisation_that_changed_the_base_is_not_merged(seed: int) -> None:
    pissa = make_adapter(SHAPES, seed=seed, name="p", config_extra={"init_lora_weights": "pissa"})
    result = run([Client("p", 1.0, pissa)])
    with pytest.raises(InvalidInput, match="plain LoRA"):
        result.merge_into(Model())


def test_into_a_checkpoint(seed: int, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    from fastagg.checkpoint import merge_into_checkpoint

    torch.manual_seed(seed)
    clients, model = mixed_round(seed), Model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(before, tmp_path / "base" / "model.safetensors")
    for accumulator in ("stack", "dense"):
        result = run(clients, accumulator=accumulator)
        merge_into_checkpoint(tmp_path / "base", result.change(), tmp_path / accumulator)
        merged = load_file(tmp_path / accumulator / "model.safetensors")
        expected = expected_weights(before, clients, result)
        assert merged.keys() == expected.keys()
        for name, weight in merged.items():
            torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-5)


# With PEFT itself


def test_a_model_that_peft_wraps(seed: int) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, modules_to_save=["score"],
        target_modules=["q_proj", "v_proj", "up", "embed_tokens", "patch"],
    )
    plain = Model()
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    wrapped = peft.get_peft_model(plain, config)
    clients = mixed_round(seed)
    result = run(clients)
    lora = {name: weight.clone() for name, weight in wrapped.state_dict().items()
            if "lora_" in name}
    result.merge_into(wrapped)
    expected = expected_weights(before, clients, result)
    after = wrapped.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in lora.items())
    for copy in ("original_module", "modules_to_save.default"):
        torch.testing.assert_close(
            after[f"base_model.model.score.{copy}.weight"].double(), expected["score.weight"]
        )
    for module in result.modules:
        torch.testing.assert_close(
            after[f"base_model.model.{module}.base_layer.weight"].double(),
            expected[f"{module}.weight"], rtol=1e-5, atol=1e-5,
        )


# Threads, and how modules are grouped


@pytest.mark.parametrize("accumulator", ["stack", "dense"])
def test_one_result_serves_several_threads(seed: int, accumulator: str) -> None:
    clients = mixed_round(seed)
    ranks = [1, 2, 3, 5, 8, 16]
    expected = {rank: run(clients, accumulator=accumulator).adapter(rank=rank).flat
                for rank in ranks}
    result = run(clients, accumulator=accumulator)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = pool.map(lambda rank: (rank, result.adapter(rank=rank).flat), ranks * 4)
            assert all(torch.equal(flat, expected[rank]) for rank, flat in got)
            assert result.report.to_dict()["modules"]


@pytest.mark.parametrize("wide", ["a", "c", "h"])
def test_bits_do_not_depend_on_how_modules_are_grouped(seed: int, wide: str) -> None:
    # The wide module has so many rows that another route is the fastest for it.
    shapes = dict.fromkeys("abcdefgh", (96, 80))
    clients = [client(f"c{k}", 4, seed=seed + k, modules=shapes, rank_pattern={wide: 64})
               for k in range(4)]
    handout, settings = methods.get("flexlora").handout, Settings()
    routes = {handout.route(96, 80, rows, 64, settings) for rows in (16, 256)}
    assert len(routes) == 2
    loose = run(clients)
    tight = run(clients)
    tight._writer.limit = 1
    assert len(list(tight._writer.parts())) == 8 > len(list(loose._writer.parts()))
    for each in clients[:2]:
        flats = [result.adapter(client=each.name).flat for result in (loose, tight)]
        assert torch.equal(*flats)
    for left, right in zip(loose.report.modules, tight.report.modules, strict=True):
        assert left.route == right.route
