"""What `simulate` adds to the bare training steps of the same clients.

The bare loop has the model with a client's adapter in it by PEFT, AdamW and the batches ready; only its
steps are timed. It takes turns with `simulate`, whose rounds are timed from end to end but for what
evaluation took. In the first round, whose starting weights are known, both must come to the same
losses bit for bit: they did the same work.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastagg.federated.clients.client import Client
from fastagg.federated.clients.token_loss import Batch
from fastagg.federated.seeds import seed_of
from fastagg.federated.simulation.cohort import Cohort
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.events import ClientStep, Event, RoundFinished
from fastagg.federated.simulation.preparation import prepare
from fastagg.federated.simulation.simulate import simulate

ROUNDS = 2  # the first begins with fresh adapters, the second with what the server handed out

# How long a step takes does not depend on what the model knows, and no time of evaluation counts.
UNTIMED = {
    "model.embedded.steps": "0",
    "evaluation.max_examples": "1",
    "evaluation.distance": "false",
    "output.plots": "false",
}
WARM_UP = {"training.epochs": "0", "training.steps": "1"}


def run(config: RunConfig, methods: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Times the bare loop and each method's rounds in turn, after one short warm-up of all."""
    timed = RunConfig.of(config.model_dump(), UNTIMED | {"federation.rounds": str(ROUNDS)})
    _turn(RunConfig.of(timed.model_dump(), WARM_UP), methods)
    bare: list[float] = []
    ratios: dict[str, list[float]] = {method: [] for method in methods}
    rounds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repetitions):
        steps, simulated = _turn(timed, methods)
        bare += steps
        for method, seconds in simulated.items():
            rounds[method] += seconds
            ratios[method] += [one / beside for one, beside in zip(seconds, steps, strict=True)]
    return {
        "case": "rounds of simulate beside the clients' bare training steps",
        "rounds": ROUNDS * repetitions,
        "bare_seconds": _summary(bare),
        "rows": [
            {
                "name": method,
                "seconds": _summary(rounds[method]),
                "times_bare": _summary(ratios[method]),
            }
            for method in methods
        ],
    }


def _summary(values: list[float]) -> dict[str, float]:
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "low": low,
        "high": high,
        "repetitions": len(values),
    }


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [
        f"{record['case']}, medians of {record['rounds']} rounds",
        f"  {'bare steps':12s}{record['bare_seconds']['median']:8.2f} s",
    ]
    for row in record["rows"]:
        times = row["times_bare"]
        lines.append(
            f"  {row['name']:12s}{row['seconds']['median']:8.2f} s, {times['median'] - 1:+.1%} "
            f"(quartiles {times['low'] - 1:+.1%} to {times['high'] - 1:+.1%})"
        )
    return "\n".join(lines)


def _turn(config: RunConfig, methods: Sequence[str]) -> tuple[list[float], dict[str, list[float]]]:
    """The seconds of each round, bare and by method."""
    bare, losses = bare_rounds(config)
    simulated = {}
    for method in methods:
        simulated[method], theirs = _simulated(config, method)
        if theirs != losses:
            raise RuntimeError(f"{method}: the bare loop did not do the clients' work")
    return bare, simulated


def _simulated(config: RunConfig, method: str) -> tuple[list[float], list[float]]:
    """The seconds of each round without its evaluation, and every loss of the first one's steps."""
    seconds: list[float] = []
    losses: list[float] = []
    began = time.perf_counter()

    def watch(event: Event) -> None:
        nonlocal began
        if isinstance(event, ClientStep) and event.round == 1:
            losses.append(event.loss)
        if isinstance(event, RoundFinished):
            now = time.perf_counter()
            if event.round:
                seconds.append(now - began - event.line["seconds"]["evaluate"])
            began = now

    with tempfile.TemporaryDirectory(prefix="fastagg-bench-") as folder:
        options = {"federation.methods": method, "output.folder": folder}
        simulate(RunConfig.of(config.model_dump(), options), observer=watch)
    return seconds, losses


def bare_rounds(config: RunConfig) -> tuple[list[float], list[float]]:
    """The seconds of each round's steps, and every loss of the first round's."""
    with tempfile.TemporaryDirectory(prefix="fastagg-bench-") as folder:
        return _bare_rounds(config, Cohort.open(config, prepare(config, Path(folder))))


def _bare_rounds(config: RunConfig, cohort: Cohort) -> tuple[list[float], list[float]]:
    seconds: list[float] = []
    losses: list[float] = []
    for number in range(1, ROUNDS + 1):
        spent = 0.0
        for client in cohort.clients:
            factors = seed_of(config.seed, "factors", number)
            with cohort.model.adapter(client.config, seed=factors) as network:
                network.train()
                batches = [Batch.of(examples) for examples in _batches(client, config, number)]
                start = time.perf_counter()
                found = _steps(network, batches, client)
                spent += time.perf_counter() - start
            if number == 1:
                losses += found
        seconds.append(spent)
    return seconds, losses


def _steps(network: nn.Module, batches: Sequence[Batch], client: Client) -> list[float]:
    """A training loop as one writes it down."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    rate, clip = client.training.learning_rate, client.training.clip
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=client.training.weight_decay)
    losses = []
    for step, batch in enumerate(batches):
        optimiser.param_groups[0]["lr"] = rate * client.training.rate(step, len(batches))
        logits = network(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        total = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
        )
        loss = total / batch.tokens
        optimiser.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(weights, clip)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def _batches(client: Client, config: RunConfig, number: int) -> Iterator[list[Any]]:
    """The client's own batches of a round: epochs of its examples, each in a new order."""
    training = client.training
    seed = seed_of(seed_of(config.seed, "training", number, client.name), "batches")
    draw = torch.Generator().manual_seed(seed)
    left = training.total_steps(len(client.train))
    while True:
        order = torch.randperm(len(client.train), generator=draw).tolist()
        for begin in range(0, len(order), training.batch):
            if not left:
                return
            yield [client.train[i] for i in order[begin : begin + training.batch]]
            left -= 1
