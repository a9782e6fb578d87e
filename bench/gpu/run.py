"""``python -m bench.gpu.run``: every GPU measurement beside its baselines, and a record of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu import ceilings, flexlora, hostile, reconstruction, stacking
from bench.gpu.timing import Clock, machine
from bench.kernels import table

CASES = ("stack", "reconstruct", "exact", "randomized", "hostile")


def main() -> None:
    """Parses the options, measures the ceilings, then the cases that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.run", description=__doc__)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--device", default="cuda", help="cpu tries the suite, at small sizes")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--record", type=Path, help="a folder for one JSON file a case")
    options = parser.parse_args()
    clock = Clock(torch.device(options.device))
    quick = options.quick or clock.device.type == "cpu"
    torch.manual_seed(0)
    about = machine(clock.device)
    limits = ceilings.run(clock, quick)
    _show("ceilings", about, limits, table(limits), options.record)
    copy, matrix = limits["copy_bytes_per_second"], limits["bf16_flops_per_second"]
    runs: dict[str, list[Callable[[], dict[str, Any]]]] = {
        "stack": [partial(stacking.run, clock, quick, times, copy) for times in (1, 10)],
        "reconstruct": [
            partial(reconstruction.run, clock, quick, rows, copy, matrix) for rows in (160, 1600)
        ],
        "exact": [partial(flexlora.run, clock, quick, 1, flexlora.exact, baselines=True)],
        "randomized": [partial(flexlora.run, clock, quick, 10, flexlora.randomized, baselines=False)],
        "hostile": [partial(hostile.run, clock, quick)],
    }
    for name, cases in runs.items():
        if options.case and name not in options.case:
            continue
        for part, case in enumerate(cases):
            record = case()
            text = hostile.table(record) if name == "hostile" else table(record)
            _show(f"{name}-{part + 1}", about, record, text, options.record)


def _show(
    name: str, about: dict[str, Any], record: dict[str, Any], text: str, folder: Path | None
) -> None:
    print(text, end="\n\n", flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        document = {"schema": 1, "machine": about, "results": [record]}
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
