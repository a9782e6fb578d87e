"""Rounds over any transport: what each client is handed, against the equations in float64."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import MODULES, make_adapter, make_config, make_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from fastagg.adapter import Adapter
from fastagg.engines.exchange import Exchange
from fastagg.engines.versions import require
from fastagg.errors import FastAggError, InvalidInput

RANKS = {"ann": 2, "ben": 4, "cyd": 8, "dan": 16}
WEIGHTS = {"ann": 10, "ben": 30, "cyd": 5, "dan": 100}
ALPHA = 16.0


def delta(state: dict[str, torch.Tensor], module: str, rank: int) -> torch.Tensor:
    """s B A in float64, by the keys' ends alone."""
    (a,) = (t for key, t in state.items() if key.endswith(f"{module}.lora_A.weight"))
    (b,) = (t for key, t in state.items() if key.endswith(f"{module}.lora_B.weight"))
    assert a.shape[0] == b.shape[1] == rank
    return ALPHA / rank * b.double() @ a.double()


def average(answers: dict[str, dict[str, torch.Tensor]], module: str) -> torch.Tensor:
    total = sum(WEIGHTS[name] for name in answers)
    parts = [WEIGHTS[name] * delta(state, module, RANKS[name]) for name, state in answers.items()]
    return torch.stack(parts).sum(0) / total


def answers_of(names: Any, seed: int, **options: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: make_state_dict(rank=RANKS[name], seed=seed + place, **options)
        for place, name in enumerate(names)
    }


def assert_best(
    adapter: Adapter, exact: torch.Tensor, module: str, rank: int, room: float = 2e-6
) -> None:
    """The adapter's own s B A is as near to the exact dW as a matrix of its rank can be."""
    handed = delta(adapter.state_dict(), module, rank)
    best = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
    error = torch.linalg.matrix_norm(handed - exact)
    assert error <= best + room * torch.linalg.matrix_norm(exact)


def play(exchange: Exchange, answers: dict[str, dict[str, torch.Tensor]], config: bool = False) -> Any:
    exchange.begin(answers)
    for name, state in answers.items():
        own = make_config(rank=RANKS[name]) if config else None
        assert exchange.receive(name, state, WEIGHTS[name], own) is None
    return exchange.finish()


def with_ranks(**options: Any) -> Exchange:
    return Exchange("flexlora", initial=make_adapter(rank=8), ranks=RANKS, **options)


def test_every_client_gets_the_best_approximation_at_its_rank() -> None:
    exchange = with_ranks()
    for seed in (0, 10):
        for name, rank in RANKS.items():
            outgoing = exchange.outgoing(name)
            assert outgoing.round == exchange.round and outgoing.merges == ()
            assert {outgoing.adapter.rank(module) for module in MODULES} == {rank}
        answers = answers_of(RANKS, seed)
        outcome = play(exchange, answers)
        assert outcome.participants == tuple(sorted(RANKS)) and not outcome.failures
        for name, rank in RANKS.items():
            for module in MODULES:
                assert_best(exchange.outgoing(name).adapter, average(answers, module), module, rank)
    assert exchange.round == 3


def test_first_adapters_change_nothing_and_share_their_rows() -> None:
    exchange = with_ranks()
    small, large = exchange.outgoing("ann").adapter, exchange.outgoing("dan").adapter
    for module in MODULES:
        assert not delta(small.state_dict(), module, 2).any()
        assert torch.equal(small.factors(module)[0], large.factors(module)[0][:2])
        assert bool(large.factors(module)[0].any(1).all())
        assert small.scaling(module) == ALPHA / 2


def test_ranks_are_learned_from_the_answers() -> None:
    exchange = Exchange("flexlora")
    assert exchange.outgoing("ann").adapter is None
    answers = answers_of(RANKS, 3, prefix="model.base_model.model.")
    play(exchange, answers, config=True)
    for name, rank in RANKS.items():
        adapter = exchange.outgoing(name).adapter
        assert adapter.state_dict().keys() == answers[name].keys()
        for module in MODULES:
            assert_best(adapter, average(answers, module), module, rank)


def test_nothing_of_an_answer_is_handed_on_before_its_round_is_over() -> None:
    exchange = Exchange("flexlora", min_clients=2)
    outcome = play(exchange, answers_of(["ann"], 0), config=True)
    assert outcome.aggregate is None and "min_clients is 2" in outcome.problem
    assert exchange.clients == () and exchange.round == 1


@pytest.mark.parametrize("late", [1, 3, 8, 16, 24])
def test_a_client_that_joins_later_gets_the_best_approximation_too(late: int) -> None:
    exchange = with_ranks()
    answers = answers_of(["ben", "dan"], 5)
    play(exchange, answers)
    exchange.enrol("eve", rank=late)
    adapter = exchange.outgoing("eve").adapter
    for module in MODULES:
        exact = average(answers, module)
        kept = torch.linalg.svd(exact, full_matrices=False)
        # What the others were handed is of rank 16 at most.
        best = (kept.U[:, :16] * kept.S[:16]) @ kept.Vh[:16]
        assert_best(adapter, best, module, late, room=1e-5)
        a, b = adapter.factors(module)
        assert bool((a.any(1) | b.any(0)).all()), "a rank that could never be trained"


def test_a_client_may_change_its_rank() -> None:
    exchange = with_ranks()
    play(exchange, answers_of(RANKS, 0))
    changed = {"ann": make_state_dict(rank=16, seed=50)}
    exchange.begin(["ann"])
    assert exchange.receive("ann", changed["ann"], 10, make_config(rank=16)) is None
    exchange.finish()
    for name, rank in {**RANKS, "ann": 16}.items():
        for module in MODULES:
            assert_best(exchange.adapter(name), delta(changed["ann"], module, 16), module, rank)


def test_ranks_that_dw_does_not_fill_can_still_be_trained() -> None:
    exchange = with_ranks()
    exchange.enrol("dan")
    answers = answers_of(["ann"], 9)
    play(exchange, answers)
    adapter = exchange.adapter("dan")
    for module in MODULES:
        a, b = adapter.factors(module)
        assert bool((a.any(1) | b.any(0)).all())
        assert_best(adapter, average(answers, module), module, 16)


def test_failures_are_left_out_and_named() -> None:
    exchange = with_ranks()
    for name in RANKS:
        exchange.outgoing(name)
    answers = answers_of(RANKS, 20)
    key = next(iter(answers["ben"]))
    broken = {**answers["ben"], key: torch.full_like(answers["ben"][key], float("nan"))}
    exchange.begin(RANKS)
    assert exchange.receive("ann", answers["ann"], WEIGHTS["ann"]) is None
    assert "NaN" in str(exchange.receive("ben", broken, 1))
    assert "heard" in str(exchange.receive("ann", answers["ann"], 1))
    assert "no part" in str(exchange.receive("eve", answers["ann"], 1, make_config(rank=2)))
    assert "weight" in str(exchange.receive("cyd", answers["cyd"], float("inf")))
    outcome = exchange.finish()
    assert [failure.client for failure in outcome.failures] == ["ben", "ann", "eve", "cyd", "dan"]
    assert outcome.failures[-1].reason == "has not answered"
    assert outcome.participants == ("ann",)
    for name, rank in RANKS.items():
        for module in MODULES:
            assert_best(exchange.adapter(name), delta(answers["ann"], module, 2), module, rank)


def test_an_answer_of_another_rank_without_its_configuration_is_refused() -> None:
    exchange = with_ranks()
    exchange.outgoing("ann")
    exchange.begin(["ann"])
    failure = exchange.receive("ann", make_state_dict(rank=4), 1)
    assert "ann" in str(failure) and "rank" in str(failure)
    assert exchange.finish().aggregate is None


def test_weights_without_an_average_do_not_end_the_run() -> None:
    exchange = with_ranks()
    exchange.outgoing("ann")
    exchange.begin(["ann"])
    exchange.receive("ann", make_state_dict(rank=2), 0)
    outcome = exchange.finish()
    assert outcome.aggregate is None and outcome.problem and exchange.round == 1


def test_flora_hands_each_stack_on_once_also_to_late_comers() -> None:
    exchange = Exchange("flora", initial=make_adapter(rank=8), ranks=RANKS)
    deltas = []
    for seed, names in ((0, ["ann", "ben"]), (7, ["ann", "cyd"])):
        answers = answers_of(names, seed)
        merged = {name: [number for number, _ in exchange.outgoing(name).merges] for name in names}
        assert merged == ({"ann": [], "ben": []} if not deltas else {"ann": [1], "cyd": [1]})
        for name in names:
            fresh = exchange.outgoing(name).adapter
            assert not any(delta(fresh.state_dict(), m, RANKS[name]).any() for m in MODULES)
        play(exchange, answers)
        deltas.append({module: average(answers, module) for module in MODULES})
    assert [number for number, _ in exchange.outgoing("ann").merges] == [2]
    assert [number for number, _ in exchange.outgoing("ben").merges] == [1, 2]
    for number, stack in exchange.outgoing("new").merges:
        for module in MODULES:
            torch.testing.assert_close(
                stack.delta(module).double(), deltas[number - 1][module], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("method", ["flexlora", "flora"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "model.base_model.model."])
def test_rounds_are_saved_and_resumed_to_the_bit(method: str, prefix: str, tmp_path: Path) -> None:
    runs = {}
    for kind in ("whole", "resumed"):
        folder = tmp_path / kind
        exchange = Exchange(method, folder=folder)
        play(exchange, answers_of(RANKS, 0, prefix=prefix), config=True)
        if kind == "resumed":
            exchange = Exchange(method, folder=folder, resume=True)
        play(exchange, answers_of(["ann", "dan"], 30, prefix=prefix))
        runs[kind] = exchange
    assert runs["resumed"].round == 3 and runs["resumed"].clients == runs["whole"].clients
    for name in RANKS:
        ours, theirs = (runs[kind].outgoing(name) for kind in ("whole", "resumed"))
        pairs = list(zip(ours.merges, theirs.merges, strict=True))
        assert [one[0] for one, _ in pairs] == [other[0] for _, other in pairs]
        adapters = [(one[1], other[1]) for one, other in pairs]
        if method == "flexlora":
            adapters.append((ours.adapter, theirs.adapter))
        for one, other in adapters:
            mine, yours = one.state_dict(), other.state_dict()
            assert mine.keys() == yours.keys()
            assert all(torch.equal(mine[key], yours[key]) for key in mine)


def test_what_is_saved_loads_as_peft_folders(tmp_path: Path) -> None:
    exchange = with_ranks(folder=tmp_path)
    for name in RANKS:
        exchange.outgoing(name)
    play(exchange, answers_of(RANKS, 0))
    folders = sorted((tmp_path / "round-0001").glob("adapter-*"))
    assert sorted(max(Adapter.load(f).rank(m) for m in MODULES) for f in folders) == [2, 4, 8, 16]
    assert not list(tmp_path.glob(".*"))


def test_saved_rounds_are_neither_overwritten_nor_mixed_up(tmp_path: Path) -> None:
    exchange = with_ranks(folder=tmp_path)
    play(exchange, answers_of(RANKS, 0), config=True)
    with pytest.raises(InvalidInput, match="resume=True"):
        with_ranks(folder=tmp_path)
    with pytest.raises(InvalidInput, match="method"):
        Exchange("flora", folder=tmp_path, resume=True)
    (tmp_path / "round-0001" / "clients.json").write_text("{")
    with pytest.raises(InvalidInput, match="cannot be resumed"):
        with_ranks(folder=tmp_path, resume=True)
    shutil.rmtree(tmp_path)
    tmp_path.write_text("a file")
    with pytest.raises(InvalidInput, match="not a folder"):
        with_ranks(folder=tmp_path)


def test_a_round_that_cannot_be_saved_changes_nothing(tmp_path: Path) -> None:
    exchange = with_ranks(folder=tmp_path / "rounds")
    play(exchange, answers_of(RANKS, 0), config=True)
    before = {name: exchange.adapter(name).state_dict() for name in RANKS}
    (tmp_path / "rounds" / "round-0002").write_text("in the way")
    with pytest.raises(FastAggError, match="round-0002"):
        play(exchange, answers_of(RANKS, 1))
    assert exchange.round == 2
    for name, state in before.items():
        now = exchange.adapter(name).state_dict()
        assert all(torch.equal(now[key], state[key]) for key in state)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(RANKS)), st.booleans()), min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_whoever_takes_part_whenever(plays: list[tuple[str, bool]], dtype: torch.dtype) -> None:
    """Any sequence of clients that answer or fail leaves everyone with the best of the last round."""
    exchange = with_ranks()
    exact = None
    for place, (name, answers) in enumerate(plays):
        exchange.outgoing(name)
        exchange.begin([name])
        if answers:
            state = make_state_dict(rank=RANKS[name], seed=place, dtype=dtype)
            assert exchange.receive(name, state, 1, make_config(rank=RANKS[name])) is None
            exact = (state, RANKS[name])
        else:
            exchange.fail(name, "crashed")
        assert (exchange.finish().aggregate is not None) == answers
    room = {torch.float32: 2e-6}.get(dtype, 1e-2)
    for name in exchange.clients if exact else ():
        for module in MODULES:
            target = delta(exact[0], module, exact[1])
            assert_best(exchange.adapter(name), target, module, RANKS[name], room)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": {"ann": 2}}, "initial"),
        ({"min_clients": 0}, "min_clients"),
        ({"method": "nothing"}, "nothing"),
        ({"initial": "no/such/folder"}, "no folder"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        Exchange(**options)


def test_a_framework_that_is_missing_or_too_new_is_named() -> None:
    with pytest.raises(FastAggError, match=r"not installed.*nowhere >= 1\.0, < 2.*fastagg\[nw\]"):
        require("nowhere", [], since="1.0", below="2", extra="nw")
    with pytest.raises(FastAggError, match=r"numpy .* never tried.*numpy >= 0\.1, < 0\.2"):
        require("numpy", [], since="0.1", below="0.2", extra="np")
    with pytest.raises(FastAggError, match=r"has no numpy\.no_such_thing.*numpy >= 1, < 99"):
        require("numpy", ["numpy:no_such_thing"], since="1", below="99", extra="np")
    require("numpy", ["numpy:ndarray", "numpy.linalg"], since="1", below="99", extra="np")


def test_a_client_that_was_restarted_is_sent_all_stacks_that_it_lacks() -> None:
    exchange = Exchange("flora", initial=make_adapter(rank=8), ranks=RANKS)
    for seed in (0, 10, 20):
        play(exchange, answers_of(RANKS, seed))
    assert [number for number, _ in exchange.outgoing("ann").merges] == [3]
    exchange.merged_through("ann", 1)
    assert [number for number, _ in exchange.outgoing("ann").merges] == [2, 3]
    exchange.merged_through("ann", 0)
    assert [number for number, _ in exchange.outgoing("ann").merges] == [1, 2, 3]
    exchange.merged_through("ann", 99)
    assert exchange.outgoing("ann").merges == ()
    assert [number for number, _ in exchange.outgoing("ben").merges] == [3]


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_the_result_is_one_adapter(method: str) -> None:
    exchange = Exchange(method, initial=make_adapter(rank=8), ranks=RANKS)
    assert exchange.result is not None and exchange.result.rank(next(iter(MODULES))) == 8
    answers = answers_of(RANKS, 0)
    play(exchange, answers)
    for module in MODULES:
        exact = average(answers, module)
        if method == "flora":
            a, b = exchange.result.factors(module)
            found = exchange.result.scaling(module) * b.double() @ a.double()
            assert torch.linalg.matrix_norm(found - exact) <= 2e-6 * torch.linalg.matrix_norm(exact)
        else:
            assert_best(exchange.result, exact, module, 16)
    assert Exchange(method).result is None
