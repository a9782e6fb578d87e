"""The server: what each method hands to whom, and who takes part in what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equations import (
    CONV,
    EMBEDDING,
    SAVED,
    SHAPES,
    Client,
    as_matrix,
    client,
    exact,
    norm_shares,
    one_thread,  # noqa: F401
    optimal_error,
    padded_means,
    shares,
)
from server_rounds import (
    MODULES,
    RANKS,
    assert_same_hand_outs,
    delta,
    fresh,
    handed,
    play,
    target,
    trained,
    whole_mean,
)

from fastagg import Adapter, ClientUpdate, MemoryBudgetExceeded, methods
from fastagg.errors import InvalidInput
from fastagg.federated.messages import ClientFailure
from fastagg.federated.server.server import Server, TooFewUpdates
from fastagg.federated.server.server_optimisers import FedAdam, FedAvg, FedAvgM

EQUAL = dict.fromkeys(RANKS, 4)


def ranks_for(method: str) -> dict[str, int]:
    return EQUAL if method == "fedit" else RANKS


def changed(adapter: Adapter, **tensors: Any) -> Adapter:
    """A copy with some tensors replaced, by the end of their keys."""
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    for end, tensor in tensors.items():
        state[next(key for key in state if end in key)] = tensor
    return Adapter(state, adapter.config, name=adapter.name)


# What each method hands out


@pytest.mark.parametrize("method", methods.names())
def test_the_first_round_begins_with_fresh_factors(method: str) -> None:
    server = Server(method, fresh(ranks_for(method)))
    for name in server.clients:
        handout = server.handout(name)
        assert (handout.round, handout.adapter, handout.merge) == (1, None, False)


def test_after_flora_every_client_has_the_base_weight_plus_dw(
    seed: int, rng: torch.Generator
) -> None:
    server = Server("flora", fresh())
    base = {module: torch.randn(shape, generator=rng).double() for module, shape in MODULES.items()}
    effective = {name: dict(base) for name in server.clients}
    expected = dict(base)
    for number, names in enumerate(("abc", "de")):
        clients = trained(seed + 10 * number, names=names)
        outcome = play(server, clients)
        assert (outcome.round, outcome.participants) == (number + 1, tuple(names))
        for module in MODULES:
            expected[module] = expected[module] + exact(clients, module)
        for name in server.clients:
            handout = server.handout(name)
            assert handout.merge
            assert handout.round == number + 2
            assert handout.adapter is not None
            assert handout.adapter.rank(next(iter(MODULES))) == sum(RANKS[each] for each in names)
            for module in MODULES:
                effective[name][module] = effective[name][module] + delta(handout.adapter, module)
    for weights in effective.values():
        for module, weight in weights.items():
            assert (weight - expected[module]).norm() <= 1e-6 * expected[module].norm()


@pytest.mark.parametrize("accumulator", ["stack", "dense"])
@pytest.mark.parametrize("participants", ["abcde", "ce", "a"])
def test_after_flexlora_every_client_is_at_the_optimum_of_its_rank(
    seed: int, participants: str, accumulator: str
) -> None:
    """Also clients that took no part, and those whose rank is above that of all who did."""
    server = Server("flexlora", fresh(), accumulator=accumulator)
    clients = trained(seed, names=participants)
    play(server, clients)
    for name, adapter in handed(server).items():
        assert not server.handout(name).merge
        for module in MODULES:
            dw = exact(clients, module)
            assert adapter.rank(module) == RANKS[name]
            assert adapter.scaling(module) == 2.0
            error = float((delta(adapter, module) - dw).norm())
            best = optimal_error(dw, RANKS[name])
            assert best - 1e-6 * float(dw.norm()) <= error <= best + 2e-6 * float(dw.norm())


@pytest.mark.parametrize("method", ["fedit", "zeropad", "hetlora"])
@pytest.mark.parametrize("participants", ["abcde", "ac"])
def test_averaging_methods_hand_out_the_first_rows_of_the_means(
    seed: int, method: str, participants: str
) -> None:
    ranks = ranks_for(method)
    server = Server(method, fresh(ranks))
    clients = trained(seed, ranks, participants)
    play(server, clients)
    for name, adapter in handed(server).items():
        for module in MODULES:
            weights = (
                norm_shares(clients, module)
                if method == "hetlora"
                else shares(clients, module, "renormalise")
            )
            mean_a, mean_b = padded_means(clients, module, weights)
            a, b = (factor.double() for factor in adapter.factors(module))
            rank = min(ranks[name], mean_a.shape[0])
            torch.testing.assert_close(a[:rank], mean_a[:rank], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(
                adapter.scaling(module) * b[:, :rank], mean_b[:, :rank], rtol=1e-6, atol=1e-7
            )
            assert not a[rank:].any()
            assert not b[:, rank:].any()


def test_every_client_keeps_its_names_ranks_scalings_and_dtype(seed: int) -> None:
    options: dict[str, dict[str, Any]] = {
        "plain": {"rank": 4},
        "narrow": {"rank": 4, "dtype": torch.bfloat16},
        "half": {"rank": 6, "dtype": torch.bfloat16, "alpha": 3.0},
        "other": {"rank": 8, "prefix": "model.base_model.model.", "use_rslora": True},
        "pattern": {"rank": 2, "rank_pattern": {"up": 5}, "alpha_pattern": {"v_proj": 7.0}},
    }
    registered = {
        name: client(name, zero_b=True, modules=MODULES, **each).adapter
        for name, each in options.items()
    }
    server = Server("flexlora", registered)
    clients = [client("plain", 4, modules=MODULES, seed=seed)]
    play(server, clients)
    for name, adapter in handed(server).items():
        like = registered[name]
        assert adapter.name == name
        assert adapter.config == like.config
        assert {key: (t.shape, t.dtype) for key, t in adapter.state_dict().items()} == {
            key: (t.shape, t.dtype) for key, t in like.state_dict().items()
        }
        for module in MODULES:
            dw = exact(clients, module)
            slack = 4e-3 if adapter.dtype == torch.bfloat16 else 1e-6
            error = float((delta(adapter, module) - dw).norm())
            assert error <= optimal_error(dw, like.rank(module)) + slack * float(dw.norm())


def test_clients_of_one_kind_share_what_they_are_handed(seed: int) -> None:
    server = Server("flexlora", fresh({f"c{k:03}": 4 for k in range(200)} | {"big": 8}))
    play(server, trained(seed, {"c000": 4, "c001": 4}))
    addresses = {adapter.flat.data_ptr() for adapter in handed(server).values()}
    assert len(addresses) == 2


@pytest.mark.parametrize("optimiser", [None, FedAvgM()])
def test_what_nobody_of_a_round_has_stays(seed: int, optimiser: FedAvgM | None) -> None:
    """Modules and whole tensors that only other clients train."""
    v_proj, up = MODULES
    less = {v_proj: MODULES[v_proj]}
    narrow = client("narrow", 4, modules=less, seed=seed)
    wide = client("wide", 4, modules=MODULES, seed=seed + 1, saved=True)
    registered = {
        "narrow": client("narrow", 4, modules=less, zero_b=True).adapter,
        "wide": client("wide", 4, modules=MODULES, zero_b=True, saved=True).adapter,
    }
    server = Server("flexlora", registered, optimiser=optimiser)
    play(server, [narrow])
    got = handed(server)["wide"]
    for index in (0, 1):
        assert torch.equal(got.factors(up)[index], registered["wide"].factors(up)[index])
    assert torch.equal(got.state_dict()[SAVED], registered["wide"].state_dict()[SAVED])
    assert (delta(got, v_proj) - narrow.delta(v_proj)).norm() <= 2e-6 * narrow.delta(v_proj).norm()
    play(server, [wide])
    after_wide = handed(server)["wide"]
    assert (delta(after_wide, up) - wide.delta(up)).norm() <= 2e-6 * wide.delta(up).norm()
    play(server, [narrow])
    got = handed(server)["wide"]
    for index in (0, 1):
        assert torch.equal(got.factors(up)[index], after_wide.factors(up)[index])
    assert torch.equal(got.state_dict()[SAVED], wide.adapter.state_dict()[SAVED])


def test_options_of_the_aggregator_pass_through(seed: int) -> None:
    server = Server("flora", fresh(), dtype="bfloat16", missing="zero", seed=3, route="qr")
    outcome = play(server, trained(seed))
    assert outcome.aggregate is not None
    assert outcome.aggregate.report.missing == "zero"
    assert {adapter.dtype for adapter in handed(server).values()} == {torch.bfloat16}
    server = Server("flexlora", fresh(), accumulator="dense", dtype=torch.float16)
    outcome = play(server, trained(seed))
    assert outcome.aggregate is not None
    assert outcome.aggregate.report.accumulator == "dense"
    with pytest.raises(InvalidInput, match="keeps no sum"):
        server.delta(next(iter(MODULES)))
    assert {adapter.dtype for adapter in handed(server).values()} == {torch.float16}
    with pytest.raises(MemoryBudgetExceeded):
        Server("flexlora", fresh(), max_memory=100).start_round("ab")
    with pytest.raises(InvalidInput, match="no such option"):
        Server("flexlora", fresh(), missing="?")
    with pytest.raises(TypeError, match="colour"):
        Server("flexlora", fresh(), colour="red")


# Server optimisers


@pytest.mark.parametrize("method", methods.names())
def test_fedavg_gives_the_bits_that_no_optimiser_gives(seed: int, method: str) -> None:
    ranks = ranks_for(method)
    servers = [Server(method, fresh(ranks), optimiser=each) for each in (None, FedAvg())]
    for number, names in enumerate(("abcde", "bd")):
        clients = trained(seed + 10 * number, ranks, names)
        for server in servers:
            play(server, clients)
    assert_same_hand_outs(*servers)


@pytest.mark.parametrize("method", ["flexlora", "fedit", "zeropad", "hetlora"])
@pytest.mark.parametrize(
    "optimiser", [FedAvgM(0.7, 0.9), FedAdam(0.02, 0.9, 0.99, 1e-3)], ids=["fedavgm", "fedadam"]
)
def test_continuing_clients_get_the_best_of_the_optimised_sum(
    seed: int, method: str, optimiser: FedAvgM | FedAdam
) -> None:
    ranks = ranks_for(method)
    server = Server(method, fresh(ranks), optimiser=optimiser)
    totals = {module: torch.zeros(shape).double() for module, shape in MODULES.items()}
    moments: dict[str, dict[str, torch.Tensor]] = {module: {} for module in MODULES}
    for number, names in enumerate(("abc", "de", "abcde")):
        clients = trained(seed + 10 * number, ranks, names)
        outcome = play(server, clients)
        assert outcome.aggregate is not None
        for module in MODULES:
            gradient = target(method, clients, module) - totals[module]
            # The optimiser is checked against its equation elsewhere: here it runs in float64.
            change, moments[module] = optimiser.step(gradient, moments[module])
            totals[module] = totals[module] + change
            assert (server.delta(module) - totals[module]).norm() <= 1e-5 * totals[module].norm()
        for name, adapter in handed(server).items():
            assert not server.handout(name).merge
            for module in MODULES:
                total = totals[module]
                error = float((delta(adapter, module) - total).norm())
                best = optimal_error(total, ranks[name])
                assert abs(error - best) <= 1e-5 * float(total.norm())
                assert adapter.scaling(module) == 2.0


def test_merging_clients_get_the_dense_change_itself(seed: int) -> None:
    optimiser = FedAdam(0.02)
    server = Server("flora", fresh(), optimiser=optimiser)
    moments: dict[str, dict[str, torch.Tensor]] = {module: {} for module in MODULES}
    for number, names in enumerate(("abc", "de")):
        clients = trained(seed + 10 * number, names=names)
        play(server, clients)
        for module, shape in MODULES.items():
            change, moments[module] = optimiser.step(exact(clients, module), moments[module])
            for name, adapter in handed(server).items():
                assert server.handout(name).merge
                assert adapter.rank(module) == min(shape)
                assert adapter.scaling(module) == 1.0
                assert (delta(adapter, module) - change).norm() <= 1e-5 * change.norm()


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_an_optimiser_serves_every_kind_of_module_and_averages_whole_tensors(
    seed: int, method: str
) -> None:
    options: dict[str, Any] = {"special": True, "saved": True, "modules": MODULES}
    ranks = {"a": 4, "b": 6}
    server = Server(method, fresh(ranks, **options), optimiser=FedAvgM(), dtype="float32")
    clients = trained(seed, ranks, **options)
    play(server, clients)
    adapter = handed(server)["b"]
    for module in (*MODULES, EMBEDDING, CONV):
        dw = exact(clients, module)
        best = optimal_error(dw, adapter.rank(module))
        error = float((delta(adapter, module) - dw).norm())
        assert abs(error - best) <= 1e-5 * float(dw.norm())
        if method == "flexlora":
            like = as_matrix(server.delta(module), dw, transposed=module == EMBEDDING)
            assert (like - dw).norm() <= 1e-5 * dw.norm()
    torch.testing.assert_close(
        adapter.state_dict()[SAVED].double(), whole_mean(clients), rtol=1e-6, atol=1e-6
    )


def test_an_optimiser_needs_adapters_that_begin_at_zero() -> None:
    registered = {
        "a": changed_config(client("a", 4, modules=MODULES), init_lora_weights="pissa")
    }
    with pytest.raises(InvalidInput, match="begin at zero") as caught:
        Server("flexlora", registered, optimiser=FedAvgM())
    assert caught.value.field == "init_lora_weights"


def changed_config(each: Client, **fields: object) -> Adapter:
    return Adapter(each.adapter.state_dict(), {**each.adapter.config.raw, **fields})


@pytest.mark.parametrize("rate", [3e38, 1e300])
def test_a_step_that_is_not_finite_changes_nothing(seed: int, rate: float) -> None:
    server = Server("flexlora", fresh(), optimiser=FedAvgM(learning_rate=rate))
    with pytest.raises(InvalidInput, match="range of float32") as caught:
        play(server, trained(seed))
    assert caught.value.module in MODULES
    assert server.round == 1
    assert server.handout("a").adapter is None


def test_a_hand_out_that_does_not_fit_its_dtype_is_refused(seed: int) -> None:
    registered = fresh({"a": 4}, dtype=torch.float16)
    server = Server("flexlora", registered, optimiser=FedAvgM(learning_rate=1e7))
    with pytest.raises(InvalidInput, match="does not fit into") as caught:
        play(server, trained(seed, {"a": 4}))
    assert "bfloat16" in str(caught.value)
    assert server.round == 1


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_an_optimiser_forgets_a_round_that_failed(seed: int, method: str) -> None:
    """The step was made, and what came of it does not fit into the clients' dtype."""
    options: dict[str, Any] = {"dtype": "float16", "optimiser": FedAvgM()}
    server, other = (Server(method, fresh({"a": 4}), **options) for _ in "12")
    for each in (server, other):
        play(each, trained(seed, {"a": 4}))
    adapter = trained(seed + 1, {"a": 4})[0].adapter
    huge = Adapter({key: 1e3 * t for key, t in adapter.state_dict().items()}, adapter.config)
    with pytest.raises(InvalidInput, match="does not fit into"):
        play(server, [ClientUpdate(huge, client_id="a")])
    assert_same_hand_outs(server, other)
    for each in (server, other):
        play(each, trained(seed + 2, {"a": 4}))
    assert_same_hand_outs(server, other)


# Who takes part in what


def bad_updates(each: Client) -> dict[str, tuple[ClientUpdate, str]]:
    """What a server refuses, and what it says."""
    adapter = each.adapter
    nan = torch.full_like(adapter.factors(next(iter(MODULES)))[0], float("nan"))
    taller = {**MODULES, "model.layers.0.mlp.up": (41, 24)}
    more = {**MODULES, "model.layers.1.mlp.up": (40, 24)}
    less = dict(list(MODULES.items())[:1])
    other: dict[str, Client] = {
        "shape": client(each.name, 4, modules=taller),
        "rank": client(each.name, 5, alpha=10.0, modules=MODULES),
        "scaling": client(each.name, 4, alpha=1.0, modules=MODULES),
        "module too many": client(each.name, 4, modules=more),
        "module too few": client(each.name, 4, modules=less),
        "whole tensor": client(each.name, 4, modules=MODULES, saved=True),
        "base model": client(each.name, 4, modules=MODULES, base_model="another"),
    }
    expected = {
        "shape": "41x24",
        "rank": "of rank 5",
        "scaling": "scaling 0.25",
        "module too many": "got linear",
        "module too few": "got none",
        "whole tensor": "score",
        "base model": "base_model_name_or_path",
    }
    found = {name: (each.update, expected[name]) for name, each in other.items()}
    found["nan"] = (ClientUpdate(changed(adapter, lora_A=nan), 5, each.name), "NaN")
    return found


@pytest.mark.parametrize("method", ["flexlora", "flora", "zeropad"])
@pytest.mark.parametrize("what", list(bad_updates(client("a", 4, modules=MODULES))))
def test_a_bad_update_is_refused_and_the_round_goes_on(seed: int, method: str, what: str) -> None:
    good = trained(seed, names="bc")
    bad, says = bad_updates(client("a", 4, modules=MODULES, seed=seed))[what]
    server = Server(method, fresh())
    # The bad one comes in between: what it left behind would show in either of the others.
    server.start_round("abc")
    assert server.receive(good[0].update) is None
    failure = server.receive(bad)
    assert isinstance(failure, ClientFailure)
    assert (failure.client, failure.round) == ("a", 1)
    assert says in str(failure)
    assert isinstance(failure.__cause__, InvalidInput)
    assert server.receive(good[1].update) is None
    outcome = server.finish_round()
    assert outcome.participants == ("b", "c")
    assert outcome.failures == (failure,)
    without = Server(method, fresh())
    play(without, good)
    assert_same_hand_outs(server, without)
    # It is served, and may take part again.
    assert server.handout("a").round == 2
    assert play(server, trained(seed + 9, names="ab")).participants == ("a", "b")


def test_a_bad_update_that_comes_first_does_not_set_the_shapes(seed: int) -> None:
    server = Server("flexlora", fresh())
    server.start_round("ab")
    bad, _ = bad_updates(client("a", 4, modules=MODULES))["shape"]
    assert server.receive(bad) is not None
    assert server.receive(trained(seed, names="b")[0].update) is None
    assert server.finish_round().participants == ("b",)


def test_answers_that_are_not_due_are_refused(seed: int) -> None:
    server = Server("flexlora", fresh())
    a, b, c = trained(seed, names="abc")
    server.start_round("ab")
    assert server.waiting_for == ("a", "b")
    assert server.receive(a.update) is None
    twice = server.receive(client("a", 4, modules=MODULES, seed=seed + 5).update)
    uninvited = server.receive(c.update)
    stranger = server.receive(client("zoe", 4, modules=MODULES, seed=seed).update)
    server.fail("b", "no answer within 60 s")
    late = server.receive(b.update)
    assert server.waiting_for == ()
    outcome = server.finish_round()
    assert outcome.participants == ("a",)
    assert [failure.client for failure in outcome.failures] == ["a", "c", "zoe", "b", "b"]
    for failure, says in (
        (twice, "already"), (uninvited, "no part"), (stranger, "does not know"), (late, "already")
    ):
        assert failure in outcome.failures
        assert says in str(failure)
    assert "60 s" in outcome.failures[3].reason
    alone = Server("flexlora", fresh())
    play(alone, [a])
    assert_same_hand_outs(server, alone)


def test_crashes_time_outs_and_silence_are_failures(seed: int) -> None:
    server = Server("flexlora", fresh())
    server.start_round("abcd")
    server.fail("c", "out of memory")
    server.receive(trained(seed, names="a")[0].update)
    with pytest.raises(InvalidInput, match="already") as caught:
        server.fail("a", "it crashed after its answer")
    assert caught.value.client == "a"
    for name in ("e", "nobody"):
        with pytest.raises(InvalidInput):
            server.fail(name, "not asked")
    outcome = server.finish_round()
    assert outcome.participants == ("a",)
    assert {failure.client: failure.reason for failure in outcome.failures} == {
        "c": "out of memory",
        "b": "client 'b' has not answered",
        "d": "client 'd' has not answered",
    }
    assert 0 < outcome.seconds < 60


def test_a_round_with_too_few_updates_ends_with_the_reasons(seed: int) -> None:
    server = Server("flexlora", fresh(), min_clients=2)
    play(server, trained(seed))
    before = Server("flexlora", fresh(), min_clients=2)
    play(before, trained(seed))
    server.start_round("abc")
    server.fail("b", "timed out")
    server.receive(trained(seed + 1, names="a")[0].update)
    with pytest.raises(TooFewUpdates) as caught:
        server.finish_round()
    said = str(caught.value)
    assert "round 2: 1 usable updates came, and min_clients is 2" in said
    assert "timed out; client 'c' has not answered" in said
    assert "on_too_few" in said
    outcome = caught.value.outcome
    assert (outcome.round, outcome.attempt, outcome.aggregate) == (2, 1, None)
    assert outcome.participants == ("a",)
    assert (server.round, server.attempt) == (2, 2)
    assert_same_hand_outs(server, before)


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_a_round_with_too_few_updates_is_repeated(seed: int, method: str) -> None:
    servers = [
        Server(method, fresh(), min_clients=2, on_too_few="repeat", optimiser=each)
        for each in (None, None)
    ]
    first, second = trained(seed), trained(seed + 10, names="bd")
    for server in servers:
        play(server, first)
    repeating = servers[0]
    for attempt in (1, 2):
        repeating.start_round("cd")
        repeating.receive(trained(seed + 20, names="c")[0].update)
        outcome = repeating.finish_round()
        assert (outcome.round, outcome.attempt, outcome.aggregate) == (2, attempt, None)
        assert outcome.participants == ("c",)
        assert [failure.client for failure in outcome.failures] == ["d"]
        assert_same_hand_outs(*servers)
    for server in servers:
        outcome = play(server, second)
        assert outcome.round == 2
        assert outcome.aggregate is not None
    assert_same_hand_outs(*servers)
    assert (repeating.round, repeating.attempt) == (3, 1)


def test_a_round_without_an_average_leaves_the_server_as_it_was(seed: int) -> None:
    server, other = Server("flexlora", fresh()), Server("flexlora", fresh())
    for each in (server, other):
        play(each, trained(seed))
    with pytest.raises(InvalidInput, match="weight"):
        play(server, [client("a", 4, modules=MODULES, weight=0.0)])
    assert_same_hand_outs(server, other)
    assert server.round == 2
    assert play(server, trained(seed + 1)).round == 2


def test_rounds_begin_and_end_in_turn(seed: int) -> None:
    server = Server("flexlora", fresh(), min_clients=2)
    update = trained(seed, names="a")[0].update
    for call in (lambda: server.receive(update), lambda: server.fail("a", "?"), server.finish_round):
        with pytest.raises(InvalidInput, match="no round is in progress"):
            call()
    assert server.start_round("ab") == 1
    with pytest.raises(InvalidInput, match="round 1 is in progress"):
        server.start_round("ab")
    with pytest.raises(InvalidInput, match="not an update"):
        server.receive(update.adapter)  # type: ignore[arg-type]
    assert server.waiting_for == ("a", "b")


@pytest.mark.parametrize("participants", [[], ["a"], ["a", "a", "b"], ["a", "zoe"]])
def test_participants_are_known_distinct_and_enough(participants: list[str]) -> None:
    server = Server("flexlora", fresh(), min_clients=2)
    with pytest.raises(InvalidInput) as caught:
        server.start_round(participants)
    assert caught.value.field == "participants" or caught.value.client == "zoe"
    assert server.start_round(["a", "b"]) == 1


def test_what_a_server_is_not_made_of() -> None:
    good = fresh()
    with pytest.raises(InvalidInput, match="needs clients"):
        Server("flexlora", {})
    with pytest.raises(InvalidInput, match="registered by its name"):
        Server("flexlora", {"a": {"r": 4}})  # type: ignore[dict-item]
    with pytest.raises(InvalidInput, match="cannot mix ranks"):
        Server("fedit", good)
    taller = {module: (m + 1, n) for module, (m, n) in MODULES.items()}
    with pytest.raises(InvalidInput, match="another shape"):
        Server("flexlora", {**good, "f": client("f", modules=taller).adapter})
    for count in (0, len(good) + 1, True, 1.5):
        with pytest.raises(InvalidInput, match="min_clients"):
            Server("flexlora", good, min_clients=count)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="on_too_few"):
        Server("flexlora", good, on_too_few="stop")
    with pytest.raises(InvalidInput, match="does not know this client"):
        Server("flexlora", good).handout("zoe")


def test_an_update_may_have_another_dtype_and_prefix(seed: int) -> None:
    sent = client("a", 4, modules=MODULES, seed=seed, dtype=torch.bfloat16, prefix="x.base_model.model.")
    server = Server("flexlora", fresh())
    play(server, [sent])
    adapter = handed(server)["a"]
    assert adapter.dtype == torch.float32
    for module in MODULES:
        expected = exact([sent], module)
        assert (delta(adapter, module) - expected).norm() <= 2e-6 * expected.norm()


def test_all_kinds_of_shapes_at_once(seed: int) -> None:
    """Clients that differ in modules, ranks and patterns, none of which takes part in every round."""
    some = dict(list(SHAPES.items())[:4])
    options: dict[str, dict[str, Any]] = {
        "c0": {"rank": 8, "special": True, "saved": True},
        "c1": {"rank": 16, "use_rslora": True},
        "c2": {"rank": 2, "modules": some},
    }
    server = Server("flexlora", {n: client(n, zero_b=True, **o).adapter for n, o in options.items()})
    for number, names in enumerate((("c2",), ("c0", "c1"))):
        clients = [client(n, seed=seed + 3 * number, **options[n]) for n in names]
        play(server, clients)
    for name, adapter in handed(server).items():
        for module in adapter.modules:
            dw = exact(clients, module)
            best = optimal_error(dw, adapter.rank(module))
            error = float((delta(adapter, module) - dw).norm())
            assert abs(error - best) <= 2e-6 * float(dw.norm()), name
