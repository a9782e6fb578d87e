"""``python -m bench.run``: all measurements, their tables, and a record under bench/results/."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import kernels, llama7b_qv, memory
from bench.measure import machine

CASES = ("stack", "reconstruct", "svd", "memory", "llama7b-qv-10")


def main() -> None:
    """Parses the options and runs the cases that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--record", type=Path, help="write the record here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    results = []
    with tempfile.TemporaryDirectory(prefix="fastagg-bench-") as folder:
        for name, (run, table) in _cases(Path(folder), options.quick).items():
            if options.case and name not in options.case:
                continue
            record = run()
            results.append(record)
            print(table(record), end="\n\n", flush=True)
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": 1, "machine": about, "results": results}
        options.record.write_text(json.dumps(document, indent=1) + "\n")


def _cases(
    folder: Path, quick: bool
) -> dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]]:
    size = 256 if quick else 4096
    kernel: dict[str, Any] = {"size": size, **({"repetitions": 3} if quick else {})}
    model = {"layers": 2, "size": 256, "repetitions": 1} if quick else {}
    held = {"layers": 2, "size": 256} if quick else {}
    return {
        "stack": (lambda: kernels.stacking(**kernel), kernels.table),
        "reconstruct": (lambda: kernels.reconstruction(**kernel), kernels.table),
        "svd": (lambda: kernels.decomposition(**kernel), kernels.table),
        "memory": (lambda: memory.run(folder, **held), memory.table),
        "llama7b-qv-10": (lambda: llama7b_qv.run(folder, **model), llama7b_qv.table),
    }


if __name__ == "__main__":
    main()
