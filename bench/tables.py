"""``python -m bench.tables [--check]``: the README's tables of what integrations and trees cost.

They are taken from the records that ``python -m bench.engines --record FILE`` and ``python -m bench.tree
--record FILE`` wrote. With ``--check`` they are only compared, and a difference is an error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.readme import README, ROOT, rewrite, table

RESULTS = ROOT / "bench" / "results"


def engines(path: Path) -> str:
    """What each integration adds to the Aggregator's time."""
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (
            row["engine"],
            f"{1000 * row['seconds']:.0f} ms",
            f"{1000 * row['from_state_dicts_seconds']:.0f} ms",
            f"{row['added']['median']:+.1%}",
            f"{row['added']['low']:+.1%} to {row['added']['high']:+.1%}",
        )
        for row in record["rows"]
    ]
    head = ("", "a round", "`Aggregator`", "added", "quartiles")
    said = f"{record['case']}; medians of {record['repeats']} turns, {_where(record, record['threads'])}"
    return f"{_link(path)}: {said}.\n\n{table(head, rows)}"


def tree(path: Path) -> str:
    """What truncating between the levels of a tree costs its largest hand-out."""
    record = json.loads(path.read_text(encoding="utf-8"))
    settings, results = record["settings"], [each for each in record["results"] if each["kept"]]
    kept = sorted({each["kept"] for each in results})
    found = {(each["factors"], each["tree"], each["kept"]): each["excess"] for each in results}
    names = dict.fromkeys((each["factors"], each["tree"]) for each in results)
    rows = [
        (factors, shape, *(f"{found[factors, shape, rank]:.0e}" for rank in kept))
        for factors, shape in names
    ]
    handed = settings["handed_out"]
    head = ("factors", "tree", *(f"kept {rank} ({rank / handed:g}r)" for rank in kept))
    said = (
        f"{settings['clients']} clients of ranks {', '.join(map(str, settings['ranks']))}, "
        f"{settings['modules']} modules of {settings['size']} x {settings['size']}, the worst of "
        f"{settings['seeds']} seeds, {_where(record, record['machine']['threads'])}"
    )
    return f"{_link(path)}: {said}.\n\n{table(head, rows)}"


SECTIONS: Mapping[str, Callable[[Path], str]] = {"engines": engines, "tree": tree}


def _link(path: Path) -> str:
    place = path.relative_to(ROOT)
    return f"[`{place}`]({place})"


def _where(record: Mapping[str, Any], threads: int) -> str:
    machine = record["machine"]
    return (
        f"{threads} thread{'s' * (threads > 1)} of an {machine['cpu']} ({machine['capability']}), torch "
        f"{machine['torch']}, {machine['date']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options and writes, or checks, the README."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    for name, section in SECTIONS.items():
        newest = max(RESULTS.glob(f"{name}-*.json"))
        marks = f"<!-- {name}: written by python -m bench.tables -->", f"<!-- {name}: end -->"
        rewrite(README, *marks, section(newest), check=options.check)


if __name__ == "__main__":
    main()
