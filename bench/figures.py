"""``python -m bench.figures RECORD..``: the README's figures, written from records of `fastagg bench`.

What stands between the two marks in README.md is replaced by tables of the records; with --check it is
only compared, and a difference is an error. No figure there is written by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.readme import README, rewrite, rows_of, source, table
from fastagg.bench.cases import CASES, SERIES
from fastagg.bench.durations import format_seconds
from fastagg.bench.growth import growth, headline
from fastagg.bench.record import Record, Row, read_record
from fastagg.byte_sizes import format_bytes

BEGIN = "<!-- figures: written by python -m bench.figures -->"
END = "<!-- figures: end -->"
MODEL = "llama7b-qv-10"
STRONG = "cat + 2 QR + core SVD"

# What is aimed at on two cores: (what, aim, op, the row above, the row below, as a percentage).
GOALS = (
    ("exact SVD, times as fast as the strong baseline", "2", "svd", STRONG, "fastagg gram", False),
    ("`stack_`, share of a memory copy's rate", "80%", "stack", "memory copy", "fastagg stack_", True),
    (
        "`reconstruct`, share of torch.mm's rate", "95%", "reconstruct",
        "torch.mm, of the stack", "fastagg reconstruct, of the stack", True,
    ),
    (
        "folders to folders, over reading, kernels and writing apart", "at most 1.5", "end-to-end",
        "fastagg aggregate", "read, kernels, write: the sum", False,
    ),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options and writes, or checks, the README."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", help="rows are of the first that has them")
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    rewrite(README, BEGIN, END, figures(options.records), check=options.check)


def figures(paths: Sequence[Path]) -> str:
    """All tables, as Markdown."""
    records = [read_record(path) for path in paths]
    sources = "\n".join(source(r, path) for r, path in zip(records, paths, strict=True))
    parts = (_goals, _end_to_end, _models, _growth)
    return "\n\n".join([sources, *(part(records) for part in parts)])


def _goals(records: Sequence[Record]) -> str:
    lines = []
    for what, aim, op, over, under, percent in GOALS:
        named = {row.contender: row for row in rows_of(records, MODEL, op)}
        above, below = named[over], named[under]
        ratio = above.seconds / below.seconds
        noise = max(above.noise or 0.0, below.noise or 0.0)
        measured = f"{100 * ratio:.0f}%" if percent else f"{ratio:.2f}"
        lines.append((what, aim, measured, f"{100 * noise:.0f}%"))
    importing = rows_of(records, "fresh-interpreter", "import")[0]
    seconds, noise = format_seconds(importing.seconds), importing.noise or 0.0
    what = "`import fastagg`, with the interpreter's start"
    lines.append((what, "at most 0.3 s", seconds, f"{100 * noise:.0f}%"))
    return f"What is aimed at, on `{MODEL}`:\n\n{table(('', 'aim', 'measured', 'noise'), lines)}"


def _end_to_end(records: Sequence[Record]) -> str:
    rows = [row for row in rows_of(records, MODEL, "end-to-end") if row.kind != "limit"]
    lines = [
        (
            _name(row),
            format_seconds(row.seconds),
            "1" if row is rows[0] else f"{row.seconds / rows[0].seconds:.3g}",
            "" if row.peak_bytes is None else format_bytes(row.peak_bytes),
            _error(row),
        )
        for row in rows
    ]
    head = ("", "median", "times slower", "memory", "excess error")
    about = (
        "FlexLoRA from folders to folders, ten clients of ranks 64 to 4, "
        f"{rows[0].modules} modules of 4096 x 4096\n(the error is that of what the first client "
        "is handed, in bfloat16; \\* timed on fewer modules\nand scaled by the counted work):"
    )
    return f"{about}\n\n{table(head, lines)}"


def _models(records: Sequence[Record]) -> str:
    """Every operation on every model: FastAgg, the fastest baseline, the limit."""
    series = {case.name for each in SERIES.values() for case in each.cases}
    tables = dict.fromkeys(pair for record in records for pair in record.tables())
    lines = []
    for case, op in tables:
        rows = rows_of(records, case, op)
        baselines = [row for row in rows if row.kind == "baseline"]
        if case in series or case not in CASES or not baselines:
            continue
        own = headline(rows)
        assert own is not None
        best = min(baselines, key=lambda row: row.seconds)
        share = "" if own.share_of_limit is None else f"{100 * own.share_of_limit:.0f}%"
        ratio = f"{best.seconds / own.seconds:.3g}"
        errors = (_error(own), _error(best))
        lines.append((f"`{case}`", op, _seconds(own), ratio, _name(best), share, *errors))
    head = ("case", "op", "FastAgg", "times faster", "than", "of limit", "error", "its error")
    return f"Ops on whole models, beside the fastest of their baselines:\n\n{table(head, lines)}"


def _growth(records: Sequence[Record]) -> str:
    lines = []
    for each in (found for record in records for found in growth(record)):
        exponents = each.headline.exponents
        values = (
            exponents.seconds,
            exponents.seconds_at_large_end,
            exponents.peak_bytes,
            exponents.peak_bytes_at_large_end,
        )
        cells = ("" if value is None else f"{value:.2f}" for value in values)
        lines.append((f"`{each.series.name}-*`", each.op, *cells))
    if not lines:
        return "Growth: in none of these records."
    head = ("series", "op", "time", "time, large half", "memory", "memory, large half")
    return f"Growth, as exponents of the bytes that come in (1 is linear):\n\n{table(head, lines)}"


def _name(row: Row) -> str:
    return row.contender + ("\\*" if row.scaled else "")


def _seconds(row: Row) -> str:
    return format_seconds(row.seconds) + ("\\*" if row.scaled else "")


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.0e}"


if __name__ == "__main__":
    main()
