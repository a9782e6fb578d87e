"""What the ranks of a test do, and the same in one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from equations import Client, client, mixed_round

import fastagg
from fastagg import Adapter, Aggregate, Aggregator

DTYPES = (torch.float32, torch.bfloat16)

# Every method with every accumulator that it can have.
KINDS = [
    ("flexlora", "stack"),
    ("flexlora", "dense"),
    ("flora", "auto"),
    ("fedit", "auto"),
    ("zeropad", "auto"),
    ("hetlora", "auto"),
]


def round_for(method: str, seed: int) -> list[Client]:
    """Clients that differ in all that the method lets them differ in."""
    if method != "fedit":
        return mixed_round(seed, DTYPES)
    return [
        client(f"c{k}", 8, seed=seed + k, weight=k + 1.0, alpha=8.0 * (k + 1), saved=k > 0)
        for k in range(3)
    ]


def aggregated(clients: list[Client], method: str, **options: Any) -> Aggregate:
    return fastagg.aggregate([each.update for each in clients], method, **options)


def streamed(clients: list[Client], method: str, **options: Any) -> Aggregate:
    """The same without knowing the clients before the first is folded in."""
    aggregator = Aggregator(method, **options)
    for each in clients:
        aggregator.add(each.update)
    return aggregator.finalize()


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def same_but_for_times(one: Mapping[str, bytes], two: Mapping[str, bytes]) -> bool:
    """Whether two folders agree to the byte, their reports in all but times and memory."""
    if one.keys() != two.keys():
        return False
    reports = [json.loads(folder["report.json"]) for folder in (one, two)]
    for report in reports:
        del report["seconds"], report["peak_memory"]
        for module in report["modules"]:
            del module["seconds"]
    return reports[0] == reports[1] and all(
        one[name] == two[name] for name in one if name != "report.json"
    )


def answers(result: Aggregate, strangers: Adapter) -> dict[str, Any]:
    """What can be asked of an aggregate in memory."""
    found: dict[str, Any] = {"clients": result.clients, "modules": result.modules}
    ranked = result.method.handout.ranked
    for name in result.clients:
        found[f"client {name}"] = result.adapter(client=name).state_dict()
    if ranked and result.method.name != "fedit":
        found["rank 3"] = result.adapter(rank=3).state_dict()
    if ranked:
        found["like"] = result.adapter(like=strangers).state_dict()
    if result.report.accumulator == "stack":
        found["stacked"] = result.stacked().state_dict()
    for module in result.modules:
        found[f"delta {module}"] = {"": result.delta(module)}
        factors = result.factors(module)
        found[f"factors {module}"] = {} if factors is None else {"a": factors[0], "b": factors[1]}
    return found


def differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """What two such answers do not agree on to the bit."""
    if one.keys() != two.keys():
        return sorted(one.keys() ^ two.keys())
    return [
        f"{what} {key}"
        for what, values in one.items()
        if isinstance(values, dict)
        for key in values.keys() | two[what].keys()
        if not torch.equal(_bits(values[key]), _bits(two[what][key]))
    ]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def refusal(work: Any) -> tuple[str, str] | None:
    """The class and text of the error that a call raises."""
    try:
        work()
    except fastagg.FastAggError as error:
        return type(error).__name__, str(error)
    return None


def rank_of(process_group: dist.ProcessGroup) -> int:
    return dist.get_rank(process_group)
