"""``python -m bench.tree``: what truncating between the levels of a tree of servers costs.

Clients of ranks 2, 4, 8 and 16 send to leaves, nodes send their states on, and the root hands out. Every
node below the root condenses to the kept rank. The hand-out at the largest client's rank r is compared,
in float64, with the best approximation of the exact dW, which is what one flat round hands out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from fastagg import Adapter, Aggregate, Aggregator, ClientUpdate
from fastagg.bench.cases import Case, Projection
from fastagg.bench.machine import describe
from fastagg.bench.workload import SCALING, Module, draw

RANKS = (2, 4, 8, 16)
CLIENTS = 64
# Servers from the leaves to the root: how many of the level below send to each.
TREES = {"flat": (64,), "wide, 8 x 8": (8, 8), "4 x 4 x 4": (4, 4, 4), "binary, 6 levels": (2,) * 6}
KEPT = (1.0, 1.5, 2.0, 4.0)  # of the largest client's rank
# The workload's factors, and what of its own each client adds beside the signal's leading direction.
FACTORS = {"random": ("random", 0.0), "signal": ("signal", 0.0), "signal, apart": ("signal", 0.3)}
# An exact route: what is measured is the tree's own error.
OPTIONS: dict[str, Any] = {"accumulator": "stack", "route": "gram", "device": "cpu"}
Tensor = torch.Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options, prints the table and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.tree", description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="m = n of a module")
    parser.add_argument("--modules", type=int, default=2, help="of each client")
    parser.add_argument("--seeds", type=int, default=3, help="how often all is drawn afresh")
    parser.add_argument("--record", type=Path, help="write the record here as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    machine = {**describe(torch.device("cpu")).model_dump(exclude_none=True), "threads": 1}
    results = []
    print(HEAD, flush=True)
    for factors in FACTORS:
        for name, tree, kept in plans():
            rounds = [one_round(factors, tree, kept, seed, options) for seed in range(options.seeds)]
            result = summed_up(factors, name, kept, rounds)
            print(line(result), flush=True)
            results.append(result)
    if options.record:
        settings = {
            "clients": CLIENTS, "ranks": RANKS, "size": options.size, "modules": options.modules,
            "seeds": options.seeds, "handed_out": max(RANKS),
        }  # fmt: skip
        document = {"schema": 1, "machine": machine, "settings": settings, "results": results}
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(document, indent=1) + "\n")


def plans() -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """The rows: a tree's name, its fan-in by level, and the rank its nodes keep; None: all."""
    yield "flat", TREES["flat"], None
    for name in ("wide, 8 x 8", "4 x 4 x 4", "binary, 6 levels"):
        yield name, TREES[name], None
        for times in KEPT:
            yield name, TREES[name], int(times * max(RANKS))


def one_round(
    factors: str, tree: Sequence[int], kept: int | None, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One round through a tree, and its figures, the worst of the modules'."""
    ranks = tuple(islice(cycle(RANKS), CLIENTS))
    projection = Projection("self_attn.q_proj", options.size, options.size, ranks)
    case = Case("tree", "", options.modules, (projection,))
    kind, own = FACTORS[factors]
    workload = draw(case, layers=options.modules, dtype=torch.float32, factors=kind, seed=seed,
                    device=torch.device("cpu"))  # type: ignore[arg-type]  # fmt: skip
    modules = dict(zip(workload.buckets[0].names, workload.by_module(), strict=True))
    if own:
        generator = torch.Generator().manual_seed(seed)
        for factor in (factor for module in modules.values() for factor in module.As + module.Bs):
            factor += own * torch.randn(factor.shape, generator=generator) / options.size**0.5
    result, sent, seconds = aggregated(modules, tree, kept)
    handed = result.adapter(rank=max(RANKS))
    found = [figures(result, handed, name, module) for name, module in modules.items()]
    return {
        **{key: max(figure[key] for figure in found) for key in found[0]},
        "sent": sent,
        "seconds": seconds,
    }


def aggregated(
    modules: dict[str, Module], tree: Sequence[int], kept: int | None
) -> tuple[Aggregate, int, float]:
    """The round of a tree, the bytes of the largest state that was sent, and the longest condensing."""
    sent, seconds = 0, 0.0
    states: list[dict[str, Any]] = []
    for level, fan_in in enumerate(tree):
        senders: Sequence[Any] = states if level else range(CLIENTS)
        states, root = [], level == len(tree) - 1
        for first in range(0, len(senders), fan_in):
            server = Aggregator(**OPTIONS)
            for sender in senders[first : first + fan_in]:
                if level:
                    part = Aggregator(**OPTIONS)
                    part.load_state_dict(sender)
                    server.merge(part)
                else:
                    server.add(update_of(modules, sender))
            if root:
                return server.finalize(), sent, seconds
            if kept is not None:
                started = time.perf_counter()
                server.condense(kept)
                seconds = max(seconds, time.perf_counter() - started)
            states.append(server.state_dict())
            sent = max(sent, nbytes(states[-1]))
    raise AssertionError("a tree has a root")


def update_of(modules: dict[str, Module], client: int) -> ClientUpdate:
    """One client's adapter, as PEFT would save it; its weight is its share in the workload."""
    state, rank = {}, 0
    for name, module in modules.items():
        state[f"base_model.model.{name}.lora_A.weight"] = module.As[client]
        state[f"base_model.model.{name}.lora_B.weight"] = module.Bs[client]
        rank = len(module.As[client])
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": SCALING * rank, "target_modules": ["q_proj"],
    }  # fmt: skip
    weight = next(iter(modules.values())).c[client]
    return ClientUpdate(Adapter(state, config), weight=weight, client_id=f"client-{client:02}")


def nbytes(state: dict[str, Any]) -> int:
    """Of a state on the wire."""
    return sum(v.nbytes if isinstance(v, Tensor) else len(v) for v in state.values())


def figures(result: Aggregate, handed: Adapter, name: str, module: Module) -> dict[str, float]:
    """Of one module, in float64: distances from the exact dW = sum_k p_k s_k B_k A_k, by |dW|."""
    A, B = module.reference()
    values = torch.linalg.svdvals(core(A, B))
    norm, optimum = float(values.norm()), float(values[max(RANKS) :].norm())
    state = {key: value.double() for key, value in handed.state_dict().items()}
    key = f"base_model.model.{name}"
    a, b = state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"]
    error = distance(A, B, a, handed.scaling(name) * b)
    factors = result.factors(name)
    assert factors is not None
    return {
        "excess": (error - optimum) / optimum,
        "excess_of_dw": (error - optimum) / norm,
        "optimum": optimum / norm,
        "lost": distance(A, B, *factors) / norm,
        "stated": result.condensed_error(name),
    }


def distance(A: Tensor, B: Tensor, a: Tensor, b: Tensor) -> float:
    """|B A - b a|_F without forming either."""
    return float(core(torch.cat([A, a]), torch.cat([B, -b], 1)).norm())


def core(A: Tensor, B: Tensor) -> Tensor:
    """R_B R_A^T, which has the singular values of B A."""
    return torch.linalg.qr(B, mode="r")[1] @ torch.linalg.qr(A.mT, mode="r")[1].mT


HEAD = (
    "| factors | tree | kept rank | excess over the optimum | excess / dW | kept off by | stated | sent "
    "by a node | condensing |\n|---|---|---|---|---|---|---|---|---|"
)


def summed_up(
    factors: str, tree: str, kept: int | None, rounds: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The worst round of each figure."""
    worst = {key: max(each[key] for each in rounds) for key in rounds[0]}
    return {"factors": factors, "tree": tree, "kept": kept, **worst}


def line(result: dict[str, Any]) -> str:
    """A row of the table."""
    kept = "all" if result["kept"] is None else str(result["kept"])
    sent = f"{result['sent'] / 1e6:.2f} MB" if result["sent"] else "-"
    return (
        f"| {result['factors']} | {result['tree']} | {kept} | {result['excess']:.1e} | "
        f"{result['excess_of_dw']:.1e} | {result['lost']:.1e} | {result['stated']:.1e} | "
        f"{sent} | {result['seconds']:.2f} s |"
    )


if __name__ == "__main__":
    main()
