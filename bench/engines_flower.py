"""What the Flower strategy adds to an Aggregator's own time, on the same updates.

    python -m bench.engines_flower --clients 10 --modules 64 --width 1024

Both get every client's tensors once and end with an adapter for each rank. The replies are made before,
as they come from the wire; messages to the nodes, the engine's transport, are not in the time.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fastagg import Adapter, Aggregator, ClientUpdate
from fastagg.engines.flower import FastAggStrategy, encode
from fastagg.engines.flower.fields import FASTAGG, config_text

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)

States = Mapping[str, Mapping[str, torch.Tensor]]


def drawn(clients: int, modules: int, width: int, dtype: torch.dtype) -> tuple[States, dict[str, Any]]:
    """(client -> state dict), and (client -> configuration), of FLoRA's ranks."""
    states, configs = {}, {}
    for number in range(clients):
        rank, name = RANKS[number % len(RANKS)], f"client-{number:03d}"
        generator = torch.Generator().manual_seed(number)
        state = {}
        for module in range(modules):
            key = f"base_model.model.model.layers.{module}.self_attn.q_proj"
            state[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=generator).to(dtype)
            state[f"{key}.lora_B.weight"] = torch.randn(width, rank, generator=generator).to(dtype)
        states[name] = state
        configs[name] = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]}
    return states, configs


def with_aggregator(states: States, configs: Mapping[str, Any]) -> Callable[[], None]:
    """The round by hand: adapters of the tensors, one aggregator, an adapter for each rank."""

    def round() -> None:
        aggregator = Aggregator("flexlora", device="cpu")
        kinds = {}
        for name, state in states.items():
            adapter = Adapter(state, configs[name], name=name)
            kinds[configs[name]["r"]] = adapter
            aggregator.add(ClientUpdate(adapter, 10, name))
        result = aggregator.finalize()
        for adapter in kinds.values():
            result.adapter(like=adapter)

    return round


def with_strategy(states: States, configs: Mapping[str, Any]) -> Callable[[], None]:
    """The same by the strategy, from messages."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    nodes = dict(enumerate(states, start=100))
    replies = []
    for node, name in nodes.items():
        content = RecordDict(
            {
                "arrays": encode(states[name]),
                "metrics": MetricRecord({"num-examples": 10}),
                FASTAGG: ConfigRecord({"adapter-config": config_text(configs[name])}),
            }
        )
        asked = Message(RecordDict(), node, "train")
        replies.append(Message(content, reply_to=asked))

    strategy = FastAggStrategy("flexlora", ranks="reply", device="cpu")

    def round() -> None:
        strategy._training = {node: str(node) for node in nodes}
        strategy.exchange.begin(strategy._training.values())
        arrays, _ = strategy.aggregate_train(1, iter(replies))
        assert arrays is not None and not strategy.failures

    return round


def flower_round(
    clients: int = 10,
    modules: int = 64,
    width: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    repetitions: int = 7,
) -> dict[str, float]:
    """Medians in seconds of ``aggregator`` and ``strategy``, which take turns, and of the share of
    ``overhead``, turn by turn."""
    states, configs = drawn(clients, modules, width, dtype)
    contenders = {
        "aggregator": with_aggregator(states, configs), "strategy": with_strategy(states, configs)
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            if repetition:  # in the first, clients become known
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    shares = [ours / theirs - 1 for theirs, ours in zip(*times.values(), strict=True)]
    return medians | {"overhead": statistics.median(shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=7)
    given = vars(parser.parse_args())
    logging.getLogger("flwr").setLevel(logging.ERROR)
    found = flower_round(**given)
    print(
        f"Aggregator {found['aggregator']:.3f} s, strategy {found['strategy']:.3f} s, "
        f"overhead {found['overhead']:+.1%}"
    )


if __name__ == "__main__":
    main()
