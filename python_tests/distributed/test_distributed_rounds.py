"""Modules shared out among processes: the bits are those of one process, and nobody reads the rest."""

from __future__ import annotations

import ctypes
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adapters import make_adapter, make_config, make_state_dict
from equations import (
    SHAPES,
    Client,
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
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ranks import Ranks
from sharded_jobs import (
    KINDS,
    aggregated,
    answers,
    differing,
    files,
    rank_of,
    refusal,
    round_for,
    same_but_for_times,
    streamed,
)

from fastagg import Adapter, Aggregator, ClientUpdate
from fastagg.folders.rounds import aggregate_folders
from fastagg.peft_format.layout import Layout


def save_all(group: dist.ProcessGroup, seed: int, out: str, how: str, missing: str) -> list[Any]:
    make = aggregated if how == "known" else streamed
    modules = []
    for method, accumulator in KINDS:
        result = make(
            round_for(method, seed),
            method,
            accumulator=accumulator,
            missing=missing,
            process_group=group,
        )
        result.save(Path(out) / f"{method}-{accumulator}")
        modules.append(
            [{each.module: each.norm for each in result.report.modules},
             [each.handout for each in result.report.clients], result.report.bytes_written]
        )
    return modules


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("how", "missing"), [("known", "renormalise"), ("streamed", "zero")])
def test_folders_have_the_bytes_of_one_process(
    ranks: Ranks, seed: int, tmp_path: Path, size: int, how: str, missing: str
) -> None:
    seen = ranks.run(size, save_all, seed, str(tmp_path), how, missing)
    assert all(each == seen[0] for each in seen[1:])
    make = aggregated if how == "known" else streamed
    for method, accumulator in KINDS:
        clients = round_for(method, seed)
        alone = make(clients, method, accumulator=accumulator, missing=missing)
        alone.save(tmp_path / "alone", force=True)
        name = f"{method}-{accumulator}"
        assert same_but_for_times(files(tmp_path / name), files(tmp_path / "alone")), name
        if method == "flexlora":
            places = json.loads((tmp_path / name / "clients.json").read_text())
            for each in clients:
                check_optimal(clients, Adapter.load(tmp_path / name / places[each.name]), missing)
    assert {path.name for path in tmp_path.iterdir()} == {
        "alone", *(f"{method}-{accumulator}" for method, accumulator in KINDS)
    }


def check_optimal(clients: list[Client], written: Adapter, missing: str) -> None:
    """The best of its rank in every module, up to the rounding of a dtype of 8 bits."""
    rounding = 1e-5 if written.dtype == torch.float32 else 2.0**-6
    for module in written.modules:
        dw, (a, b) = exact(clients, module, missing), written.factors(module)
        error = (written.scaling(module) * b.double() @ a.double() - dw).norm()
        assert error <= optimal_error(dw, a.shape[0]) + rounding * dw.norm()


def ask(group: dist.ProcessGroup, seed: int, kinds: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        answers(
            aggregated(round_for(method, seed), method, accumulator=kind, process_group=group),
            stranger(),
        )
        for method, kind in kinds
    ]


def stranger() -> Adapter:
    """An adapter from outside of the round: other ranks, a module and a tensor that nobody has."""
    modules = {**SHAPES, "model.layers.9.mlp.up": (40, 24)}
    extra = {"base_model.model.head.weight": torch.full((3, 2), 0.5)}
    return make_adapter(
        modules, rank=8, alpha=5, extra_tensors=extra, config_extra={"modules_to_save": ["head"]}
    )


def test_every_rank_gets_the_whole_answer(ranks: Ranks, seed: int) -> None:
    kinds = [kind for kind in KINDS if kind != ("flexlora", "dense")]
    found = ranks.run(3, ask, seed, kinds)
    for place, (method, kind) in enumerate(kinds):
        clients = round_for(method, seed)
        alone = answers(aggregated(clients, method, accumulator=kind), stranger())
        for each in found:
            assert not differing(each[place], alone), method
        for module in alone["modules"]:
            check_delta(clients, method, module, found[-1][place][f"delta {module}"][""])


def check_delta(clients: list[Client], method: str, module: str, delta: torch.Tensor) -> None:
    """dW against the method's equation in float64."""
    if method in ("flora", "flexlora"):
        dw = exact(clients, module)
    else:
        normed = method == "hetlora"
        p = norm_shares(clients, module) if normed else shares(clients, module, "renormalise")
        a, b = padded_means(clients, module, p)
        dw = b @ a
    slot = next(
        each.adapter.layout.by_module[module] for each in clients if module in each.modules
    )
    assert (as_matrix(delta, dw, slot.transposed) - dw).norm() <= 3e-6 * dw.norm()


@st.composite
def rounds(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Clients of any ranks, some of the modules each, of dtypes that need not agree."""
    names = sorted(SHAPES)
    return [
        {
            "rank": draw(st.integers(1, 17)),
            "weight": draw(st.floats(1e-3, 1e3)),
            "modules": {
                name: SHAPES[name]
                for name in draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            },
            "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
            "saved": draw(st.booleans()),
            "rank_pattern": draw(st.sampled_from([None, {"layers.0.attn.q_proj": 3}, {"up": 20}])),
        }
        for _ in range(draw(st.integers(1, 5)))
    ]


def ask_for(
    group: dist.ProcessGroup, options: list[dict[str, Any]], seed: int, kind: tuple[str, str]
) -> dict[str, Any]:
    return answers(
        streamed(made(options, seed), kind[0], accumulator=kind[1], process_group=group), stranger()
    )


def made(options: list[dict[str, Any]], seed: int) -> list[Client]:
    return [client(f"c{k}", seed=seed + k, **each) for k, each in enumerate(options)]


def test_any_round_has_the_bits_of_one_process(ranks: Ranks) -> None:
    @hypothesis_settings(max_examples=20)
    @given(
        options=rounds(),
        seed=st.integers(0, 2**20),
        size=st.integers(2, 4),
        kind=st.sampled_from([kind for kind in KINDS if kind[0] != "fedit"]),
    )
    def check(
        options: list[dict[str, Any]], seed: int, size: int, kind: tuple[str, str]
    ) -> None:
        alone = answers(streamed(made(options, seed), kind[0], accumulator=kind[1]), stranger())
        for each in ranks.run(size, ask_for, options, seed, kind):
            assert not differing(each, alone)

    check()


def spoilt(each: Client, module: str) -> ClientUpdate:
    state = {key: value.clone() for key, value in each.adapter.state_dict().items()}
    factor = next(key for key in state if f"{module}.lora" in key and "_B" in key)
    state[factor].view(-1)[3] = float("nan")
    return ClientUpdate(Adapter(state, each.adapter.config), each.weight, each.name)


def refuse_some(group: dist.ProcessGroup, seed: int) -> list[Any]:
    found: list[Any] = []
    clients = mixed_round(seed)
    for method, kind in (("flexlora", "stack"), ("flexlora", "dense"), ("hetlora", "auto")):
        aggregator = Aggregator(method, accumulator=kind, process_group=group)
        for each in clients:
            for module in each.modules[:: 3]:
                found.append(refusal(lambda: aggregator.add(spoilt(each, module))))  # noqa: B023
            aggregator.add(each.update)
        found.append(refusal(lambda: aggregator.add(clients[0].update)))  # noqa: B023
        found.append(answers(aggregator.finalize(), stranger()))
    return found


def test_a_module_that_one_rank_refuses_is_refused_by_all(ranks: Ranks, seed: int) -> None:
    found = ranks.run(4, refuse_some, seed)
    clients = mixed_round(seed)
    refused = [each for each in found[0] if isinstance(each, tuple)]
    assert None not in found[0]
    assert all(kind == "InvalidInput" for kind, _ in refused)
    assert sum("1 of" in text and "NaN" in text for _, text in refused) == len(refused) - 3
    rounds_made = [each for each in found[0] if isinstance(each, dict)]
    for alone, made_ in zip(
        [
            streamed(clients, "flexlora", accumulator="stack"),
            streamed(clients, "flexlora", accumulator="dense"),
            streamed(clients, "hetlora"),
        ],
        rounds_made,
        strict=True,
    ):
        assert not differing(made_, answers(alone, stranger()))
    for other in found[1:]:
        assert [each for each in other if isinstance(each, tuple)] == refused


def skip(group: dist.ProcessGroup | None, folders: list[str], out: str) -> list[tuple[str, str]]:
    report = aggregate_folders(
        folders, out, method="zeropad", skip_invalid=True, process_group=group
    )
    return [(each.client, each.reason) for each in report.skipped]


def test_invalid_clients_are_left_out_by_all(ranks: Ranks, seed: int, tmp_path: Path) -> None:
    clients = mixed_round(seed)
    folders = []
    for place, each in enumerate(clients):
        adapter = spoilt(each, each.modules[-1]).adapter if place == 1 else each.adapter
        adapter.save(tmp_path / each.name)
        folders.append(str(tmp_path / each.name))
    (tmp_path / "c3" / "adapter_config.json").unlink()
    alone = skip(None, folders, str(tmp_path / "one"))
    found = ranks.run(2, skip, folders, str(tmp_path / "two"))
    assert [name for name, _ in alone] == ["c3", "c1"]
    assert found == [alone, alone]
    assert same_but_for_times(files(tmp_path / "one"), files(tmp_path / "two"))


def feed_unlike(group: dist.ProcessGroup, seed: int) -> list[Any]:
    clients = mixed_round(seed)
    aggregator = Aggregator(process_group=group)
    found = [refusal(lambda: aggregator.add(clients[rank_of(group)].update))]
    aggregator.add(clients[0].update)
    headers = [(each.name, each.adapter.layout, each.adapter.config) for each in clients]
    fresh = Aggregator(process_group=group)
    found.append(refusal(lambda: fresh.expect(headers[: 2 + rank_of(group)])))
    return [*found, aggregator.clients]


def test_ranks_must_be_given_the_same(ranks: Ranks, seed: int) -> None:
    found = ranks.run(2, feed_unlike, seed)
    assert found[0] == found[1]
    for refused in found[0][:2]:
        assert refused[0] == "InvalidInput"
        assert "not given the same" in refused[1] and "rank 1" in refused[1]
    assert found[0][2] == ("c0",)


def budgeted(group: dist.ProcessGroup | None, seed: int, limit: int) -> Any:
    clients = mixed_round(seed)
    headers = [(each.name, each.adapter.layout, each.adapter.config) for each in clients]
    aggregator = Aggregator(accumulator="dense", max_memory=limit, process_group=group)
    refused = refusal(lambda: aggregator.expect(headers))
    if refused is not None:
        return refused
    for each in clients:
        aggregator.add(each.update)
    return aggregator.memory


def test_a_budget_is_that_of_each_process(ranks: Ranks, seed: int) -> None:
    needed = Aggregator(accumulator="dense").plan_for(
        [(each.name, each.adapter.layout, each.adapter.config) for each in mixed_round(seed)]
    )[1]
    alone = budgeted(None, seed, needed - 1)
    assert alone[0] == "MemoryBudgetExceeded"
    shared = ranks.run(4, budgeted, seed, needed - 1)
    assert all(isinstance(each, int) for each in shared)
    assert sum(shared) == budgeted(None, seed, 2 * needed)
    few = ranks.run(4, budgeted, seed, 1000)
    assert few[0][0] == "MemoryBudgetExceeded" and few == [few[0]] * 4


def outgrow(group: dist.ProcessGroup | None, seed: int) -> tuple[str, list[str]]:
    """Ten clients, of which dW is the smaller; no rank has so much that it would change by itself."""
    shapes = {f"layers.{k}.proj": (512, 256) for k in range(16)}
    aggregator = Aggregator(process_group=group)
    kinds = []
    for k in range(4):
        aggregator.add(client(f"c{k}", 420, seed=seed + k, modules=shapes).update)
        kinds.append(aggregator.accumulator_kind)
    return aggregator.accumulator_kind, kinds


def test_the_whole_round_decides_between_stack_and_sums(ranks: Ranks, seed: int) -> None:
    alone = outgrow(None, seed)
    assert alone[0] == "dense" and alone[1][0] == "stack"
    assert ranks.run(2, outgrow, seed) == [alone, alone]


def refuse_what_needs_all(group: dist.ProcessGroup, seed: int) -> list[Any]:
    clients = mixed_round(seed)
    aggregator = Aggregator(process_group=group)
    for each in clients:
        aggregator.add(each.update)
    plain = Aggregator()
    found = [
        refusal(lambda: plain.merge(aggregator)),
        refusal(lambda: aggregator.merge(plain)),
        refusal(lambda: aggregator.condense(2)),
        refusal(aggregator.state_dict),
        refusal(lambda: aggregator.load_state_dict({})),
        refusal(lambda: aggregator.combine(group)),
    ]
    result = aggregator.finalize()
    module = result.modules[0]
    matrix = torch.zeros(24, 16)
    return [
        *found,
        refusal(lambda: result.merge_into({})),
        refusal(result.change),
        refusal(lambda: result.add_delta(module, matrix)),
    ]


def test_what_needs_all_modules_says_so(ranks: Ranks, seed: int) -> None:
    for refusals in ranks.run(2, refuse_what_needs_all, seed):
        for refused in refusals:
            assert refused[0] == "InvalidInput" and "needs all modules in one process" in refused[1]


def weigh_nothing(group: dist.ProcessGroup, seed: int, kind: str) -> list[Any]:
    some = dict(list(SHAPES.items())[:1])
    few = [
        client("a", weight=1.0, seed=seed, modules=some),
        client("b", weight=0.0, seed=seed + 1),
    ]
    aggregator = Aggregator(accumulator=kind, process_group=group)
    for each in few:
        aggregator.add(each.update)
    refused = refusal(aggregator.finalize)
    aggregator.add(client("c", weight=3.0, seed=seed + 2).update)
    return [refused, differing(
        answers(aggregator.finalize(), stranger()),
        answers(
            streamed([*few, client("c", weight=3.0, seed=seed + 2)], "flexlora", accumulator=kind),
            stranger(),
        ),
    )]


@pytest.mark.parametrize("kind", ["stack", "dense"])
def test_weights_without_an_average_are_refused_by_all_and_keep_the_round(
    ranks: Ranks, seed: int, kind: str
) -> None:
    found = ranks.run(4, weigh_nothing, seed, kind)
    assert found[0][0][0] == "InvalidInput" and "weight 0" in found[0][0][1]
    for refused, unlike in found:
        assert refused == found[0][0]
        assert not unlike


PAGE = mmap.PAGESIZE
# Factors of whole pages, so that a module's bytes can be taken away page by page.
PAGED = {f"layers.{k}.proj": (256, 128) for k in range(6)}


def read_own_alone(group: dist.ProcessGroup, kinds: list[tuple[str, str]]) -> list[Any]:
    """Adds clients of whom only this rank's modules can be read: touching another ends the process."""
    found: list[Any] = []
    for method, kind in kinds:
        config = make_config(PAGED, 32)
        clients = [Adapter(make_state_dict(PAGED, 32, seed=k), config, name=f"c{k}") for k in range(3)]
        aggregator = Aggregator(method, accumulator=kind, process_group=group)
        aggregator.expect([(str(each.name), each.layout, each.config) for each in clients])
        own = {module for module in PAGED if aggregator._share.has(module)}
        kept = []
        for each in clients:
            guarded, memory = only_readable(each, own)
            kept.append(memory)
            aggregator.add(ClientUpdate(guarded))
        result = aggregator.finalize()
        found.append((sorted(own), answers(result, stranger())))
    return found


def only_readable(adapter: Adapter, own: set[str]) -> tuple[Adapter, mmap.mmap]:
    layout: Layout = adapter.layout
    memory = mmap.mmap(-1, layout.nbytes)
    memory.write(adapter.flat.numpy().tobytes())
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for slot in layout.slots:
        for span in (slot.a, slot.b):
            assert span.offset % PAGE == 0 and span.nbytes % PAGE == 0
            if slot.module not in own:
                place = ctypes.c_void_p(flat.data_ptr() + span.offset)
                assert libc.mprotect(place, ctypes.c_size_t(span.nbytes), 0) == 0
    return Adapter.from_flat(flat, layout, adapter.config, name=adapter.name), memory


def test_a_rank_reads_its_own_modules_alone(ranks: Ranks) -> None:
    kinds = [("flexlora", "stack"), ("flexlora", "dense"), ("hetlora", "auto")]
    found = ranks.run(3, read_own_alone, kinds)
    config = make_config(PAGED, 32)
    for place, (method, kind) in enumerate(kinds):
        shared = [module for each in found for module in each[place][0]]
        assert sorted(shared) == sorted(PAGED)
        alone = Aggregator(method, accumulator=kind)
        for k in range(3):
            state = make_state_dict(PAGED, 32, seed=k)
            alone.add(ClientUpdate(Adapter(state, config, name=f"c{k}")))
        expected = answers(alone.finalize(), stranger())
        for each in found:
            assert not differing(each[place][1], expected)
