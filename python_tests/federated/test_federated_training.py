"""Local training against loops and losses written out by hand."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from adapters import same_bits
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LENGTH, Tokens, examples, gpt2, gpt2_lora, llama, lora, transformers
from torch.nn.functional import cross_entropy

from fastagg.errors import InvalidInput
from fastagg.federated.clients.local_model import LocalModel
from fastagg.federated.clients.token_loss import IGNORED, Batch, TokenLoss, loss_on, summed_loss
from fastagg.federated.clients.training import (
    LocalTraining,
    Step,
    TrainingDiverged,
    TrainingOutcome,
    fit,
)

STEADY = LocalTraining(epochs=None, steps=4, batch=4, learning_rate=1e-2, schedule="constant", warm_up=0)


class Recorder(torch.nn.Module):
    """Predicts every token alike by its one weight, and remembers what it was shown in training."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(64))
        self.shown: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> Any:
        if self.training:
            self.shown.append(input_ids)
            self.masks.append(attention_mask)
        logits = self.bias.expand(*input_ids.shape, 64)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def numbered(count: int) -> list[Tokens]:
    """Examples that tell their number."""
    return [Tokens(torch.tensor([1, n]), torch.tensor([IGNORED, n])) for n in range(count)]


@torch.no_grad()
def exact_loss(network: torch.nn.Module, encoded: list[Tokens]) -> tuple[float, int]:
    """One example at a time, without padding, in float64: the sum, and over how many tokens."""
    exact = copy.deepcopy(network).double().eval()
    total, tokens = 0.0, 0
    for example in encoded:
        logits = exact(input_ids=example.input_ids[None], use_cache=False).logits[0]
        for place in range(1, len(example.labels)):
            if example.labels[place] != IGNORED:
                total += float(cross_entropy(logits[place - 1], example.labels[place]))
                tokens += 1
    return total, tokens


def adapter_bits(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: w.detach().clone() for n, w in network.named_parameters() if w.requires_grad}


def test_a_batch_is_padded_on_the_right() -> None:
    short = Tokens(torch.tensor([5, 6]), torch.tensor([IGNORED, 6]))
    long = Tokens(torch.tensor([1, 2, 3, 4]), torch.tensor([1, IGNORED, 3, 4]))
    batch = Batch.of([short, long])
    assert batch.input_ids.tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED, 6, IGNORED, IGNORED], [1, IGNORED, 3, 4]]
    assert batch.tokens == 3  # the 1 has nothing before it to be predicted from


def test_the_model_is_told_what_is_padding() -> None:
    recorder, encoded = Recorder(), examples(5)
    fit(recorder, encoded, LocalTraining(epochs=1, batch=5), seed=0)
    lengths = sorted(len(example.input_ids) for example in encoded)
    assert sorted(recorder.masks[0].sum(dim=1).tolist()) == lengths
    assert recorder.masks[0].shape == (5, lengths[-1])


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_loss_is_a_mean_over_labelled_tokens(make: Any, batch: int) -> None:
    network, encoded = make(), examples(8)
    total, tokens = exact_loss(network, encoded)
    found = loss_on(network, encoded, batch=batch)
    assert found.tokens == tokens
    assert found.total == pytest.approx(total, rel=1e-6)
    assert found.mean == pytest.approx(total / tokens, rel=1e-6)
    assert not network.training


def test_the_loss_of_a_batch_is_that_of_transformers() -> None:
    network, batch = llama(), Batch.of(examples(5))
    theirs = network(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    ours = summed_loss(network, batch) / batch.tokens
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)


def test_no_tokens_have_no_mean() -> None:
    assert math.isnan(TokenLoss(0.0, 0).mean)
    assert loss_on(llama(), []) == TokenLoss(0.0, 0)


def test_a_training_is_adamw_on_the_mean_over_tokens() -> None:
    encoded = examples(6)
    training = LocalTraining(
        epochs=5, batch=6, learning_rate=3e-3, schedule="linear", warm_up=0.4, weight_decay=0.1, clip=0.5
    )
    ours, theirs = llama(), llama()
    outcome = fit(ours, encoded, training, seed=0)
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.1)
    batch = Batch.of(encoded)
    losses = []
    for share in (1 / 2, 1, 1, 2 / 3, 1 / 3):
        optimiser.param_groups[0]["lr"] = share * 3e-3
        optimiser.zero_grad()
        loss = theirs(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert outcome.losses == pytest.approx(losses, rel=1e-4)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Adam divides by the root of the squared gradient: where that is nearly nothing, rounding shows.
        assert float((mine - other).detach().abs().max()) < 1e-4
    assert outcome.steps == 5 and outcome.examples == 30 and outcome.kept_step == 5
    assert outcome.tokens == (batch.tokens,) * 5
    assert outcome.loss == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert outcome.held_out == () and outcome.seconds > 0


def test_the_loss_of_a_training_weighs_tokens_alike() -> None:
    outcome = TrainingOutcome((1.0, 4.0), (30, 10), 4, 0.1, (), 2)
    assert outcome.loss == (30 * 1.0 + 10 * 4.0) / 40


@given(count=st.integers(1, 23), batch=st.integers(1, 9), epochs=st.integers(1, 3))
def test_an_epoch_shows_every_example_once(count: int, batch: int, epochs: int) -> None:
    recorder = Recorder()
    outcome = fit(recorder, numbered(count), LocalTraining(epochs=epochs, batch=batch), seed=count)
    shown = torch.cat(recorder.shown)[:, 1].tolist()
    assert outcome.examples == len(shown) == count * epochs
    assert outcome.steps == len(recorder.shown) == epochs * math.ceil(count / batch)
    for epoch in range(epochs):
        assert sorted(shown[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert all(len(each) <= batch for each in recorder.shown)


def test_steps_go_on_into_further_epochs_in_other_orders() -> None:
    recorder = Recorder()
    fit(recorder, numbered(40), LocalTraining(epochs=None, steps=6, batch=20), seed=0)
    halves = [each[:, 1].tolist() for each in recorder.shown]
    for first in (0, 2, 4):
        assert sorted(halves[first] + halves[first + 1]) == list(range(40))
    assert len({tuple(half) for half in halves}) == 6


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warm_up=st.floats(0, 1),
    total=st.integers(1, 300),
)
def test_the_rate_rises_then_follows_the_schedule(schedule: Any, warm_up: float, total: int) -> None:
    training = LocalTraining(schedule=schedule, warm_up=warm_up)
    rates = [training.rate(step, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    rising = math.ceil(warm_up * total)
    assert rates[:rising] == [pytest.approx((i + 1) / rising) for i in range(rising)]
    left = total - rising
    expected = {
        "constant": lambda done: 1.0,
        "linear": lambda done: 1 - done,
        "cosine": lambda done: math.cos(math.pi * done / 2) ** 2,
    }[schedule]
    assert rates[rising:] == [pytest.approx(expected(i / left)) for i in range(left)]


def test_without_a_warm_up_the_schedules_are_those_of_transformers() -> None:
    for name in ("linear", "cosine"):
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = transformers.get_scheduler(name, optimiser, 0, 12)
        for step in range(12):
            ours = LocalTraining(schedule=name, warm_up=0).rate(step, 12)
            assert ours == pytest.approx(theirs.get_last_lr()[0])
            optimiser.step()
            theirs.step()


def test_gradients_are_clipped() -> None:
    for clip, holds in ((0.05, True), (None, False)):
        network = llama()
        norms: list[float] = []

        def norm(step: Step, network: Any = network, norms: list[float] = norms) -> None:
            squares = [w.grad.square().sum() for w in network.parameters() if w.grad is not None]
            norms.append(float(torch.stack(squares).sum().sqrt()))

        training = LocalTraining(epochs=None, steps=3, batch=4, clip=clip)
        fit(network, examples(8), training, seed=0, on_step=norm)
        assert len(norms) == 3
        assert all((value <= 0.05 * (1 + 1e-5)) is holds for value in norms)


@pytest.mark.parametrize(
    ("make", "config"),
    [(llama, lora(4, lora_dropout=0.2)), (gpt2, gpt2_lora(4, lora_dropout=0.2))],
)
def test_the_seed_decides_every_bit(make: Any, config: Any) -> None:
    found = []
    for noise, seed in ((1, 7), (2, 7), (3, 8)):
        model = LocalModel(make())
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        with model.adapter(copy.deepcopy(config), seed=1) as network:
            outcome = fit(network, examples(10), STEADY, seed=seed)
            found.append((outcome.losses, adapter_bits(network)))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0][0] == found[1][0]
    assert same_bits(found[0][1], found[1][1])
    assert found[0][0] != found[2][0]


def test_dropout_is_on_while_training_alone() -> None:
    one = examples(1)
    model = LocalModel(llama())
    with model.adapter(lora(4, lora_dropout=0.5)) as network:
        # The same batch at a rate that changes nothing: its losses differ by what dropout left out.
        fit(network, one, LocalTraining(epochs=None, steps=20, batch=1, learning_rate=2e-2), seed=0)
        still = LocalTraining(epochs=None, steps=5, batch=1, learning_rate=1e-30)
        assert len(set(fit(network, one, still, seed=0).losses)) == 5
        assert not any(module.training for module in network.modules())
        assert loss_on(network, one) == loss_on(network, one)


@pytest.mark.parametrize(("make", "config"), [(llama, lora(8)), (gpt2, gpt2_lora(8))])
def test_an_adapter_learns_and_its_base_stays(make: Any, config: Any) -> None:
    model = LocalModel(make())
    before = {name: w.clone() for name, w in model.network.state_dict().items()}
    train, held_out = examples(40), examples(10, seed=1)
    start = loss_on(model.network, held_out).mean
    training = LocalTraining(epochs=8, batch=8, learning_rate=2e-2)
    with model.adapter(copy.deepcopy(config)) as network:
        outcome = fit(network, train, training, seed=0)
        end = loss_on(network, held_out).mean
    assert end < start - 1  # nats per token, of the log(64) = 4.2 that guessing has
    assert outcome.losses[-1] < outcome.losses[0] - 1
    assert same_bits(dict(model.network.state_dict()), before)


def test_every_step_is_told() -> None:
    told: list[Step] = []
    outcome = fit(llama(), examples(6), STEADY, seed=0, on_step=told.append)
    assert told == [Step(i + 1, 4, loss) for i, loss in enumerate(outcome.losses)]


def test_what_a_callback_raises_ends_the_training() -> None:
    network = llama()
    told: list[Step] = []

    def interrupt(step: Step) -> None:
        told.append(step)
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(network, examples(6), STEADY, seed=0, on_step=interrupt)
    assert len(told) == 2
    assert not network.training
    assert all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_training(poison: float) -> None:
    network = llama()
    with torch.no_grad():
        network.lm_head.weight[3, 3] = poison
    with pytest.raises(TrainingDiverged, match="at step 1") as raised:
        fit(network, examples(6), STEADY, seed=0)
    assert not math.isfinite(raised.value.loss)
    assert not network.training
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.step) == (str(raised.value), 1)


def test_a_rate_that_is_too_high_diverges_with_a_reason() -> None:
    training = LocalTraining(epochs=5, batch=4, learning_rate=1e30, clip=None)
    with pytest.raises(TrainingDiverged, match="lower learning rate"):
        fit(llama(), examples(20), training, seed=0)


def opposed(count: int) -> tuple[list[Tokens], list[Tokens]]:
    """Training examples, and held-out ones by another rule: learning the first unlearns the second."""
    train = examples(count)
    other = [Tokens((31 * e.input_ids) % 64, torch.where(e.labels < 0, e.labels, 0)) for e in train]
    return train, other


def test_early_stopping_goes_back_to_the_lowest_loss() -> None:
    train, held_out = opposed(12)
    network = llama()
    fit(network, held_out, LocalTraining(epochs=10, batch=4, learning_rate=1e-2), seed=0)
    before = loss_on(network, held_out, batch=4).mean
    training = LocalTraining(epochs=20, batch=4, learning_rate=1e-2, patience=2, evaluate_every=2)
    outcome = fit(network, train, training, seed=0, held_out=held_out)
    assert [found.step for found in outcome.held_out] == [0, 2, 4]
    assert outcome.held_out[0].loss == before
    assert outcome.steps == 4 and outcome.kept_step == 0
    assert loss_on(network, held_out, batch=4).mean == before


def test_early_stopping_lets_a_training_go_on_that_gets_better() -> None:
    train, held_out = examples(20), examples(6, seed=1)
    training = LocalTraining(epochs=3, batch=8, learning_rate=1e-2, patience=1)
    network = llama()
    outcome = fit(network, train, training, seed=0, held_out=held_out)
    losses = [found.loss for found in outcome.held_out]
    assert [found.step for found in outcome.held_out] == [0, 3, 6, 9]
    assert losses == sorted(losses, reverse=True)
    assert outcome.kept_step == 9
    # Looking does not change what is trained.
    plain = llama()
    fit(plain, train, LocalTraining(epochs=3, batch=8, learning_rate=1e-2), seed=0)
    assert same_bits(dict(network.state_dict()), dict(plain.state_dict()))


def test_early_stopping_looks_after_the_last_step_too() -> None:
    training = LocalTraining(epochs=None, steps=5, batch=4, patience=9, evaluate_every=3)
    outcome = fit(llama(), examples(8), training, seed=0, held_out=examples(3, seed=2))
    assert [found.step for found in outcome.held_out] == [0, 3, 5]


def test_a_held_out_loss_that_is_no_number_ends_the_training() -> None:
    network = llama()
    with torch.no_grad():
        network.model.embed_tokens.weight.fill_(math.nan)
    training = LocalTraining(epochs=1, patience=1)
    with pytest.raises(TrainingDiverged, match="at step 0"):
        fit(network, examples(3), training, seed=0, held_out=examples(3))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"epochs": None}, "epochs, steps"),
        ({"epochs": 1, "steps": 3}, "epochs, steps"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": None, "steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"schedule": "staircase"}, "schedule"),
        ({"warm_up": 1.5}, "warm_up"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip": 0.0}, "clip"),
        ({"patience": 0}, "patience"),
        ({"evaluate_every": 0}, "evaluate_every"),
    ],
)
def test_what_nothing_can_be_trained_with(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        LocalTraining(**options)
    assert raised.value.field == field


def test_examples_that_teach_nothing_are_named() -> None:
    good = examples(2)
    ids = torch.arange(4)
    prompt_alone = Tokens(ids, torch.tensor([2, IGNORED, IGNORED, IGNORED]))
    uneven = Tokens(ids, torch.arange(3))
    for bad, field in (
        ([], "examples"),
        ([*good, prompt_alone], "examples[2]"),
        ([uneven], "examples[0]"),
    ):
        with pytest.raises(InvalidInput) as raised:
            fit(llama(), bad, STEADY, seed=0)
        assert raised.value.field == field
    with pytest.raises(InvalidInput) as raised:
        fit(llama(), good, LocalTraining(patience=1), seed=0)
    assert raised.value.field == "held_out"


def test_examples_fill_the_model() -> None:
    assert {len(e.input_ids) for e in examples(200)} == set(range(6, LENGTH))
