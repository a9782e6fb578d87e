"""Clients in rounds: what they make of hand-outs, and that one model serves them all."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import same_bits
from tiny_models import disturb, examples, gpt2, gpt2_lora, llama, logits, lora, peft

import fastagg
from fastagg.errors import InvalidInput
from fastagg.federated.clients.client import Client
from fastagg.federated.clients.fresh_factors import draw_dead_ranks
from fastagg.federated.clients.local_model import LocalModel
from fastagg.federated.clients.token_loss import loss_on
from fastagg.federated.clients.training import LocalTraining, Step, fit
from fastagg.federated.messages import ClientFailure, Handout
from fastagg.federated.seeds import seed_of

TRAINING = LocalTraining(epochs=2, batch=4, learning_rate=1e-2)
RANKS = {"anna": 6, "ben": 3, "cleo": 2}


def client(model: LocalModel, name: str, **options: Any) -> Client:
    place = list(RANKS).index(name)
    options = {
        "config": lora(RANKS[name], lora_dropout=0.1),
        "model": model,
        "training": TRAINING,
        "seed": 11,
    } | options
    return Client(name, examples(10 + place, seed=place), examples(4, seed=9), **options)


def bits(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_an_update_is_what_the_client_trained() -> None:
    model = LocalModel(llama())
    before = bits(model.network)
    anna = client(model, "anna")
    told: list[Step] = []
    update = anna.fit(Handout(1), told.append)
    assert (update.client_id, update.weight) == ("anna", 10)
    assert same_bits(bits(model.network), before)
    assert anna.outcome is not None and len(told) == anna.outcome.steps == 6
    with model.adapter(lora(6, lora_dropout=0.1), seed=seed_of(11, "factors", 1)) as network:
        fit(network, anna.train, TRAINING, seed=seed_of(11, "training", 1, "anna"))
        by_hand = model.capture()
    assert same_bits(update.adapter.state_dict(), by_hand.state_dict())
    with model.adapter(update.adapter) as network:
        assert loss_on(network, anna.train).mean < loss_on(LocalModel(llama()).network, anna.train).mean


def test_clients_of_one_model_are_as_if_each_had_its_own() -> None:
    alone = {
        name: client(LocalModel(llama()), name).fit(Handout(1)).adapter.state_dict() for name in RANKS
    }
    for order in (list(RANKS), list(reversed(RANKS))):
        shared = LocalModel(llama())
        for name in order:
            update = client(shared, name).fit(Handout(1))
            assert same_bits(update.adapter.state_dict(), alone[name])


def test_all_clients_begin_with_the_same_rows() -> None:
    still = LocalTraining(epochs=1, learning_rate=1e-30)
    model = LocalModel(llama())
    found = {n: client(model, n, training=still).fit(Handout(1)).adapter for n in RANKS}
    for module in found["anna"].modules:
        a = found["anna"].factors(module)[0]
        for name, adapter in found.items():
            assert torch.equal(adapter.factors(module)[0], a[: RANKS[name]])


def test_a_client_goes_on_from_its_adapter() -> None:
    model = LocalModel(llama())
    anna = client(model, "anna")
    first = anna.fit(Handout(1)).adapter
    still = client(model, "anna", training=LocalTraining(epochs=1, learning_rate=1e-30))
    again = still.fit(Handout(2, first)).adapter
    for key, tensor in again.state_dict().items():
        assert torch.allclose(tensor, first.state_dict()[key], atol=1e-20, rtol=0)
    assert again.config == first.config
    further = anna.fit(Handout(2, first)).adapter
    assert not same_bits(further.state_dict(), first.state_dict())
    assert model.round == 1


@pytest.mark.parametrize(
    ("make", "config"), [(llama, lora), (lambda: llama(tied=False), lora), (gpt2, gpt2_lora)]
)
def test_after_flora_every_client_has_w_plus_dw(make: Any, config: Any) -> None:
    base = make().eval()
    shared = LocalModel(copy.deepcopy(base))
    clients = [client(shared, name, config=config(rank)) for name, rank in RANKS.items()]
    updates = [each.fit(Handout(1)) for each in clients]
    # dW by its equation, in float64, from what PEFT makes of each adapter.
    exact = copy.deepcopy(base).double()
    total = sum(update.weight for update in updates)
    with torch.no_grad():
        for update in updates:
            wrapped = peft.get_peft_model(copy.deepcopy(base), config(RANKS[update.client_id]))
            peft.set_peft_model_state_dict(wrapped, update.adapter.state_dict())
            wrapped.double()
            for module in update.adapter.modules:
                layer = wrapped.get_submodule(f"base_model.model.{module}")
                delta = layer.get_delta_weight("default")
                exact.get_submodule(module).weight += update.weight / total * delta
    handed = fastagg.aggregate(updates, "flora").stacked()
    own = LocalModel(copy.deepcopy(base))
    for each in [*clients, client(own, "ben", config=config(3))]:
        each.receive(Handout(2, handed, merge=True))
        assert each.model.round == 2
        for key, weight in each.model.network.state_dict().items():
            assert torch.allclose(weight.double(), exact.state_dict()[key], rtol=1e-6, atol=1e-6)
        assert torch.allclose(logits(each.model.network).double(), logits(exact), atol=1e-4)
    assert same_bits(bits(own.network), bits(shared.network))
    # And each starts afresh from there: an untrained adapter adds nothing.
    merged = bits(shared.network)
    still = LocalTraining(epochs=1, learning_rate=1e-30)
    for each in clients:
        each.training = still
        update = each.fit(Handout(2, handed, merge=True))
        assert same_bits(bits(shared.network), merged)
        assert update.adapter.rank(update.adapter.modules[0]) == RANKS[each.name]
        deltas = [update.adapter.delta(module) for module in update.adapter.modules]
        assert max(float(delta.abs().max()) for delta in deltas) < 1e-20
    first, second = updates[0].adapter, clients[0].fit(Handout(2, handed, merge=True)).adapter
    module = first.modules[0]
    assert not torch.equal(first.factors(module)[0], second.factors(module)[0])


def test_after_flexlora_a_client_has_the_best_of_its_rank() -> None:
    base = llama().eval()
    model = LocalModel(base)
    clients = [client(model, name) for name in RANKS]
    updates = [each.fit(Handout(1)) for each in clients]
    result = fastagg.aggregate(updates, "flexlora")
    total = sum(update.weight for update in updates)
    for each in clients:
        handed = result.adapter(client=each.name)
        with model.adapter(handed) as network:
            for module in handed.modules:
                shares = [
                    u.weight
                    / total
                    * u.adapter.scaling(module)
                    * (u.adapter.factors(module)[1].double() @ u.adapter.factors(module)[0].double())
                    for u in updates
                ]
                delta = torch.stack(shares).sum(dim=0)
                optimum = torch.linalg.svdvals(delta)[RANKS[each.name] :].norm()
                layer = network.get_submodule(f"base_model.model.{module}")
                error = (layer.get_delta_weight("default").double() - delta).norm()
                assert float(error.detach()) <= float(optimum) + 2e-6 * float(delta.norm())


def test_a_missed_round_is_noticed() -> None:
    model = LocalModel(llama())
    with model.adapter(lora(2)) as network:
        disturb(network)
        adapter = model.capture("global")
    with pytest.raises(InvalidInput, match="earlier rounds"):
        client(model, "ben").fit(Handout(4, adapter, merge=True))


def test_an_update_in_a_folder_is_the_one_in_memory(tmp_path: Path) -> None:
    model = LocalModel(llama())
    expected = client(model, "ben").fit(Handout(1)).adapter
    ben, folder = client(model, "ben"), tmp_path / "ben"
    for _ in range(2):  # a round that is repeated is written again
        update = ben.fit(Handout(1), folder=folder)
        assert (update.client_id, update.weight) == ("ben", 11)
        assert same_bits(update.adapter.state_dict(), expected.state_dict())
    assert update.adapter.config == expected.config
    assert [path.name for path in tmp_path.iterdir()] == ["ben"]
    loaded = peft.PeftModel.from_pretrained(llama(), str(folder))
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert same_bits({key: t.detach() for key, t in state.items()}, expected.state_dict())


@pytest.mark.parametrize("saved", [False, True])
def test_a_client_that_diverges_fails_by_name_and_harms_no_other(saved: bool, tmp_path: Path) -> None:
    model = LocalModel(llama())
    before = bits(model.network)
    folder = tmp_path / "anna" if saved else None
    # So near the largest float32 the next product overflows; far below, norms may bring it back.
    wild = LocalTraining(epochs=5, batch=4, learning_rate=3e37, warm_up=0, clip=None)
    with pytest.raises(ClientFailure, match="client anna, round 3: the training diverged") as raised:
        client(model, "anna", training=wild).fit(Handout(3), folder=folder)
    again = pickle.loads(pickle.dumps(raised.value))
    assert (again.client, again.round, again.reason) == ("anna", 3, raised.value.reason)
    assert str(again) == str(raised.value)
    assert same_bits(bits(model.network), before)
    assert not list(tmp_path.iterdir())
    after = client(model, "ben").fit(Handout(1)).adapter
    alone = client(LocalModel(llama()), "ben").fit(Handout(1)).adapter
    assert same_bits(after.state_dict(), alone.state_dict())


@pytest.mark.parametrize("saved", [False, True])
def test_factors_beyond_float32_after_the_last_step_fail(saved: bool, tmp_path: Path) -> None:
    folder = tmp_path / "anna" if saved else None
    # One step: the loss before it is fine, and nobody sees the one after.
    wild = LocalTraining(epochs=None, steps=1, learning_rate=3e37, warm_up=0, clip=None)
    with pytest.raises(ClientFailure, match=r"round 1.*range of float32"):
        client(LocalModel(llama()), "anna", training=wild).fit(Handout(1), folder=folder)
    assert not list(tmp_path.iterdir())


def test_a_client_without_examples_fails() -> None:
    model = LocalModel(llama())
    empty = Client("dora", [], [], config=lora(2), model=model, training=TRAINING, seed=0)
    with pytest.raises(ClientFailure, match=r"dora.*no examples"):
        empty.fit(Handout(1))


def test_early_stopping_goes_by_the_clients_own_held_out_examples() -> None:
    model = LocalModel(llama())
    training = LocalTraining(epochs=4, batch=4, learning_rate=1e-2, patience=1)
    anna = client(model, "anna", training=training)
    update = anna.fit(Handout(1))
    assert anna.outcome is not None
    lowest = min(found.loss for found in anna.outcome.held_out)
    with model.adapter(update.adapter) as network:
        assert loss_on(network, anna.held_out, batch=4).mean == lowest


@pytest.mark.parametrize(("network", "config"), [(llama, lora), (gpt2, gpt2_lora)])
def test_ranks_that_a_handout_lacks_are_trained_on(network: Any, config: Any) -> None:
    """A hand-out of a rank below the client's, as of a round with few clients, and what it becomes."""
    model = LocalModel(network())
    with model.adapter(config(6)) as placed:
        disturb(placed)
        full = model.capture("anna")
    state = {}
    for key, tensor in full.state_dict().items():
        state[key] = tensor.clone()
        (state[key] if ".lora_A." in key else state[key].t())[4:] = 0
    handout = fastagg.Adapter(state, full.config, name="anna")
    anna = client(model, "anna", config=config(6))
    seen: list[torch.Tensor] = []
    with model.adapter(handout) as placed:
        expected = logits(placed)
        draw_dead_ranks(placed, 7)
        seen.append(logits(placed))
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)
        drawn = model.capture()
    for module in handout.modules:
        (a, b), (a_given, _) = drawn.factors(module), handout.factors(module)
        assert torch.equal(a[:4], a_given[:4]) and bool((a[4:] != 0).all())
        assert not bool(b[:, 4:].any())
    trained = anna.fit(Handout(2, handout)).adapter
    for module in trained.modules:
        a, b = trained.factors(module)
        assert bool((b[:, 4:] != 0).any(0).all()), module


def test_dead_ranks_of_an_embedding_are_drawn_in_its_other_factor() -> None:
    model = LocalModel(llama(tied=False))
    with model.adapter(lora(3, target_modules=["embed_tokens"])) as placed:
        for name, weight in placed.named_parameters():
            if "lora_embedding" in name:
                weight.data.zero_()
        draw_dead_ranks(placed, 7)
        a, b = model.capture().factors("model.embed_tokens")
    assert torch.linalg.matrix_rank(a @ a.T if a.any() else b.T @ b) == 3
    assert not (a.any() and b.any())


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_are_trained_and_given_back(tied: bool) -> None:
    """Against a loop by hand over the bare model, and the model has its own weights afterwards."""
    model = LocalModel(llama(tied=tied))
    before = bits(model.network)
    anna = client(model, "anna")
    trained = anna.fit_weights(3)
    assert same_bits(bits(model.network), before)
    by_hand = llama(tied=tied)
    fit(by_hand, anna.train, TRAINING, seed=seed_of(11, "training", 3, "anna"))
    assert same_bits(trained, {name: w.detach() for name, w in by_hand.named_parameters()})
    assert loss_on(by_hand, anna.train).mean < loss_on(model.network, anna.train).mean


def test_whatever_torch_refuses_while_training_is_the_clients_failure() -> None:
    """A learning rate that float32 cannot hold: torch has a RuntimeError of its own for it."""
    wild = LocalTraining(epochs=5, batch=4, learning_rate=2e38, clip=None, warm_up=0)
    for fails in (lambda c: c.fit(Handout(1)), lambda c: c.fit_weights(1)):
        with pytest.raises(ClientFailure, match="client anna, round 1"):
            fails(client(LocalModel(llama()), "anna", training=wild))
