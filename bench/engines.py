"""``python -m bench.engines``: what each integration adds to calling an Aggregator on the same updates.

A round is everything from the clients' messages to the hand-outs of all clients, and of the global
model where the codebase has one. An integration begins with what its codebase passes to the hook. Beside
it the Aggregator is called directly, once from the same state dicts, which it takes as updates, and once
from updates that are made already and lie in memory. All three have to come to the same bits and take
turns in one process; a ratio is of the rounds of one turn. A codebase's own transport is in none.

To add an integration, write a function from :class:`Work` to a round and list it in ``ENGINES``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

import fastagg
from fastagg.bench.machine import describe
from fastagg.engines import fate_llm, federatedscope, fedml, openfedllm
from fastagg.whole_file import write_whole

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """Clients of mixed ranks: ``modules`` square modules each, and a global model of the middle rank."""

    modules: int
    size: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    def config(self, rank: int) -> dict[str, Any]:
        """The fields of an ``adapter_config.json``; alpha is the same for all ranks."""
        return {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]}

    @cached_property
    def states(self) -> list[StateDict]:
        """The clients' state dicts, as PEFT gives them."""
        return [self._state(rank, self.seed + place) for place, rank in enumerate(self.ranks)]

    @cached_property
    def model(self) -> StateDict:
        """The global model's state dict."""
        return self._state(self._middle, self.seed - 1)

    @cached_property
    def weights(self) -> list[float]:
        """Numbers of examples."""
        return [100.0 + 10 * place for place in range(len(self.ranks))]

    @cached_property
    def adapters(self) -> list[fastagg.Adapter]:
        """The clients' adapters, made."""
        pairs = zip(self.states, self.ranks, strict=True)
        return [fastagg.Adapter(state, self.config(rank)) for state, rank in pairs]

    @cached_property
    def shape_of_model(self) -> fastagg.Adapter:
        """The global model as the Aggregator takes it."""
        return fastagg.Adapter(self.model, self.config(self._middle))

    @property
    def _middle(self) -> int:
        return sorted(self.ranks)[len(self.ranks) // 2]

    def _state(self, rank: int, seed: int) -> StateDict:
        draw = torch.Generator().manual_seed(seed)
        state = {}
        for layer in range(self.modules):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
            for side, shape in (("A", (rank, self.size)), ("B", (self.size, rank))):
                values = torch.randn(shape, generator=draw) / shape[1] ** 0.5
                state[f"{key}{side}.weight"] = values.to(self.dtype)
        return state


Round = Callable[[], list[StateDict]]
"""Runs one round; returns the global model's state dict, where there is one, and every client's."""


def from_state_dicts(work: Work, *, with_model: bool) -> Round:
    """The Aggregator itself, by whoever has state dicts."""

    def run() -> list[StateDict]:
        pairs = zip(work.states, work.ranks, strict=True)
        adapters = (fastagg.Adapter(state, work.config(rank)) for state, rank in pairs)
        return _aggregated(work, adapters, with_model)

    return run


def from_updates(work: Work, *, with_model: bool) -> Round:
    """The Aggregator itself, by whoever has updates."""
    return lambda: _aggregated(work, work.adapters, with_model)


def _aggregated(work: Work, adapters: Iterable[fastagg.Adapter], with_model: bool) -> list[StateDict]:
    aggregator = fastagg.Aggregator("flexlora")
    for place, (adapter, weight) in enumerate(zip(adapters, work.weights, strict=True)):
        aggregator.add(fastagg.ClientUpdate(adapter, weight, str(place)))
    result = aggregator.finalize()
    handed = [result.adapter(like=work.shape_of_model)] if with_model else []
    handed += [result.adapter(client=client) for client in result.clients]
    return [adapter.state_dict() for adapter in handed]


def openfedllm_round(work: Work) -> Round:
    """``global_aggregate``, then each client's hand-out."""
    hook = openfedllm.GlobalAggregate(work.config(8))
    clients = range(len(work.states))

    def run() -> list[StateDict]:
        arguments = SimpleNamespace(fed_alg="fedavg")
        model, _ = hook(arguments, work.model, work.states, work.weights, clients, 0)
        return [model, *(hook.handout(client) for client in clients)]

    return run


def fedml_round(work: Work) -> Round:
    """``ServerAggregator.aggregate``, then each client's hand-out."""
    application = SimpleNamespace(get_model_params=lambda: work.model)
    aggregator = fedml.ServerAggregator(application, work.config(8))
    pairs = list(zip(work.weights, work.states, strict=True))

    def run() -> list[StateDict]:
        model = aggregator.aggregate(pairs)
        return [model, *(aggregator.handout(place) for place in range(len(pairs)))]

    return run


def federatedscope_round(work: Work) -> Round:
    """``Aggregator.aggregate``, then each client's hand-out."""
    model = SimpleNamespace(state_dict=lambda: work.model)
    aggregator = federatedscope.Aggregator(work.config(8), model=model)
    clients = range(len(work.states))
    feedback = list(zip(work.weights, work.states, strict=True))
    info = {"client_feedback": feedback, "staleness": [(client, 0) for client in clients]}

    def run() -> list[StateDict]:
        return [aggregator.aggregate(info), *(aggregator.handout(client) for client in clients)]

    return run


class _Party(dict[str, Any]):
    """A party's messages: what FATE's ``ctx.parties[rank]`` gets and puts."""

    def put(self, name: str, value: Any) -> None:
        self[name] = value


def fate_llm_round(work: Work) -> Round:
    """``model_aggregation``, which replies to every party; the arrays are float64 as FATE sends them."""
    names = list(work.model)
    server = fate_llm.AggregatorServer(names, work.config(8))
    messages = [
        ([_as_fate_sends(state[name]) for name in names], weight)
        for state, weight in zip(work.states, work.weights, strict=True)
    ]
    context = SimpleNamespace(
        guest=SimpleNamespace(rank=0),
        hosts=SimpleNamespace(ranks=range(1, len(messages))),
        parties=[_Party({"fedavg_model_mixed_client_values": message}) for message in messages],
    )

    def run() -> list[StateDict]:
        server.model_aggregation(context)
        replies = (party["fedavg_model_aggregated_values"] for party in context.parties)
        return [dict(zip(names, map(torch.from_numpy, reply), strict=True)) for reply in replies]

    return run


def _as_fate_sends(tensor: Tensor) -> NDArray[Any]:
    return (tensor if tensor.dtype == torch.float16 else tensor.double()).numpy()


ENGINES: dict[str, tuple[Callable[[Work], Round], bool]] = {
    "OpenFedLLM": (openfedllm_round, True),
    "FedML": (fedml_round, True),
    "FederatedScope": (federatedscope_round, True),
    "FATE-LLM": (fate_llm_round, False),
}
"""Name -> the integration, and whether its codebase has a global model that is handed out too."""


def measure(work: Work, repeats: int, names: Sequence[str] = tuple(ENGINES)) -> dict[str, Any]:
    """The record of one run; after one turn that is not counted, whose bits are compared."""
    rows = []
    for name in names:
        integration, with_model = ENGINES[name]
        rounds = [
            integration(work),
            from_state_dicts(work, with_model=with_model),
            from_updates(work, with_model=with_model),
        ]
        handed, *expected = [run() for run in rounds]
        for each in expected:
            check_same(name, handed, each)
        del handed, expected, each
        rows.append(_row(name, _turns(rounds, repeats)))
    return {
        "case": f"{work.modules} modules of {work.size} x {work.size}, ranks {list(work.ranks)}, "
        f"{str(work.dtype).removeprefix('torch.')}",
        "machine": describe(torch.device("cpu")).model_dump(),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "rows": rows,
    }


def _turns(rounds: Sequence[Round], repeats: int) -> list[list[float]]:
    """The seconds of each round, turn by turn; who begins changes from turn to turn."""
    seconds: list[list[float]] = [[] for _ in rounds]
    for turn in range(repeats):
        for step in range(len(rounds)):
            place = (turn + step) % len(rounds)
            start = time.perf_counter()
            rounds[place]()
            seconds[place].append(time.perf_counter() - start)
    return seconds


def check_same(name: str, handed: list[StateDict], expected: list[StateDict]) -> None:
    """Whether an integration came to the Aggregator's own bits.

    Raises:
        RuntimeError: it did not.
    """
    for ours, theirs in zip(handed, expected, strict=True):
        if ours.keys() != theirs.keys() or not all(
            torch.equal(ours[key].to(tensor.dtype), tensor) for key, tensor in theirs.items()
        ):
            raise RuntimeError(f"{name} did not hand out what the Aggregator does")


def _row(name: str, seconds: Sequence[list[float]]) -> dict[str, Any]:
    own, from_dicts, from_made = seconds
    return {
        "engine": name,
        "seconds": statistics.median(own),
        "from_state_dicts_seconds": statistics.median(from_dicts),
        "from_updates_seconds": statistics.median(from_made),
        "added": _added(own, from_dicts),
        "added_to_updates": _added(own, from_made),
    }


def _added(own: list[float], beside: list[float]) -> dict[str, float]:
    ratios = [one / other - 1 for one, other in zip(own, beside, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [f"{record['case']}; {record['threads']} threads, medians of {record['repeats']} turns"]
    for row in record["rows"]:
        added, beside = row["added"], row["added_to_updates"]
        lines.append(
            f"  {row['engine']:16s}{row['seconds']:7.3f} s; "
            f"Aggregator {row['from_state_dicts_seconds']:.3f} s: "
            f"{added['median']:+.1%} ({added['low']:+.1%} to {added['high']:+.1%}); from made updates "
            f"{row['from_updates_seconds']:.3f} s: {beside['median']:+.1%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options, measures, prints and records."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__)
    parser.add_argument("--engines", default=",".join(ENGINES), help="names, separated by commas")
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--ranks", default="2,2,4,4,8,8,16,16", help="one for each client")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", type=Path, help="write the measurements here, as JSON")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    work = Work(
        options.modules,
        options.size,
        tuple(int(rank) for rank in options.ranks.split(",")),
        getattr(torch, options.dtype),
        options.seed,
    )
    record = measure(work, options.repeats, options.engines.split(","))
    print(table(record))
    if options.record:
        write_whole(options.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
