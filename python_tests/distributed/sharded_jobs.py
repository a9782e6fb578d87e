"""What the ranks of a test do, and the same in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adapters import same_bits
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
    """Whether two folders agree to the byte, their reports in all but times and memory.

    A module's figures of quality are sums over rows that are zero where its neighbours have more: of
    these the last digits depend on the neighbours, in one process too.
    """
    if one.keys() != two.keys():
        return False
    reports = [json.loads(folder["report.json"]) for folder in (one, two)]
    figures = []
    for report in reports:
        del report["seconds"], report["peak_memory"]
        figures.append([_figures(module) for module in report["modules"]])
        for module in report["modules"]:
            for name in ("seconds", "norm", "kept", "certificate"):
                del module[name]
    return (
        reports[0] == reports[1]
        and all(_near(*modules) for modules in zip(*figures, strict=True))
        and all(one[name] == two[name] for name in one if name != "report.json")
    )


def _figures(module: Mapping[str, Any]) -> dict[str, float | None]:
    kept = {f"kept {rank}": share for rank, share in module["kept"].items()}
    return {"norm": module["norm"], "certificate": module["certificate"], **kept}


def _near(one: Mapping[str, float | None], two: Mapping[str, float | None]) -> bool:
    return one.keys() == two.keys() and all(
        (value is None) == (two[name] is None)
        and math.isclose(value or 0, two[name] or 0, rel_tol=1e-6, abs_tol=1e-15)
        for name, value in one.items()
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
    found["report"] = [
        (each.module, each.clients, each.rank_sum, each.route, sorted(each.kept))
        for each in result.report.modules
    ]
    return found


def differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """What two such answers do not agree on to the bit."""
    if one.keys() != two.keys():
        return sorted(one.keys() ^ two.keys())
    found = []
    for what, values in one.items():
        if not isinstance(values, dict):
            found += [what] * (values != two[what])
        elif values.keys() != two[what].keys():
            found.append(what)
        else:
            unlike = [key for key in values if not same_bits({key: values[key]}, {key: two[what][key]})]
            found += [f"{what} {key}" for key in unlike]
    return found


def refusal(work: Any) -> tuple[str, str] | None:
    """The class and text of the error that a call raises."""
    try:
        work()
    except fastagg.FastAggError as error:
        return type(error).__name__, str(error)
    return None


def rank_of(process_group: dist.ProcessGroup) -> int:
    return dist.get_rank(process_group)
