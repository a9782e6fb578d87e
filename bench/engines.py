"""``python -m bench.engines``: what each integration adds to calling an Aggregator on the same updates.

A round is everything from the clients' messages to the hand-outs of all clients, and of the global
model where the codebase has one. An integration begins with what its codebase passes to the hook. Beside
it the Aggregator is called directly, once from the same state dicts, which it takes as updates, and once
from updates that are made already and lie in memory. All three have to come to the same bits and take
turns in one process; a ratio is of the rounds of one turn. A codebase's own transport is in none.

To add one, write a function from :class:`Work` to a round and list it in ``engine_rounds.py``.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.engine_rounds import ENGINES
from bench.engine_work import Round, Work, check_same, from_state_dicts, from_updates
from fastagg.bench.machine import describe
from fastagg.whole_file import write_whole


def measure(work: Work, repeats: int, names: Sequence[str] = tuple(ENGINES)) -> dict[str, Any]:
    """The record of one run; after one turn that is not counted, whose bits are compared."""
    rows = []
    for name in names:
        engine = ENGINES[name]
        rounds = [
            engine.integration(work),
            from_state_dicts(work, engine.handed_out, engine.sent_as),
            from_updates(work, engine.handed_out),
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
            f"  {row['engine']:21s}{row['seconds']:7.3f} s; "
            f"Aggregator {row['from_state_dicts_seconds']:.3f} s: "
            f"{added['median']:+.1%} ({added['low']:+.1%} to {added['high']:+.1%}); from made updates "
            f"{row['from_updates_seconds']:.3f} s: {beside['median']:+.1%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options, measures, prints and records."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__)
    parser.add_argument("--engines", default=";".join(ENGINES), help="names, separated by semicolons")
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--ranks", default="2,2,4,4,8,8,16,16", help="one for each client")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", type=Path, help="write the measurements here, as JSON")
    options = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    work = Work(
        options.modules,
        options.size,
        tuple(int(rank) for rank in options.ranks.split(",")),
        getattr(torch, options.dtype),
        options.seed,
    )
    record = measure(work, options.repeats, options.engines.split(";"))
    print(table(record))
    if options.record:
        write_whole(options.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
