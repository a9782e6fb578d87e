"""``python -m bench.scale RECORD..``: the README's page on scale, from counts and from measured rates.

What a round of FlexLoRA reads, holds, sends and computes is counted from the shapes. Seconds are those
counts over rates that records of `fastagg bench` have measured: derived, not measured, and marked so.
With --check the README is only compared, and a difference is an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.readme import README, rewrite, source, table
from bench.scale_counts import (
    FEDERATIONS,
    KEPT,
    MOVED,
    OPENED,
    Federation,
    Rates,
    machines_for,
    rates,
    seconds,
)
from fastagg.bench.durations import format_seconds
from fastagg.bench.record import read_record
from fastagg.byte_sizes import format_bytes

BEGIN = "<!-- scale: written by python -m bench.scale -->"
END = "<!-- scale: end -->"
MACHINES = (1, 8, 64)
HOUR = 3600.0


def page(paths: Sequence[Path], federations: Sequence[Federation] = FEDERATIONS) -> str:
    """The section, as Markdown."""
    records = [read_record(path) for path in paths]
    rate = {each.name: rates(records, each.case) for each in federations}
    used = {MOVED, OPENED, *(each.case.name for each in federations)}
    sources = [
        source(record, path)
        for record, path in zip(records, paths, strict=True)
        if used & {row.case for row in record.rows}
    ]
    parts = [
        "Counted from the shapes: all seven projections, FLoRA's mix of ranks (64 to 4, 16 in the "
        "mean), bfloat16:",
        _counts(federations),
        "What follows is **derived**: these counts over rates that were measured, of the machine of the "
        "records. Nothing was run at this size.",
        "\n".join(sources),
        _rates(federations, rate),
        "A machine's part where **modules are shared out** and sums are dense. It opens every client's "
        "file, and reads all headers and its own modules' bytes; between machines next to nothing is "
        "sent:",
        _sharded_by_module(federations, rate),
        "What each machine sends where **clients are shared out**, since their updates arrive at "
        "different hosts: sums of dW by a reduce_scatter; or the stacks, each module's to the machine "
        f"that it is on; or, as a tree, its clients condensed to rank {KEPT}, twice the largest that "
        "is handed out, for which each machine takes the SVD of every module:",
        _sharded_by_client(federations),
        "\n\n".join(_limit(each, rate[each.name]) for each in federations),
    ]
    return "\n\n".join(parts)


def _counts(federations: Sequence[Federation]) -> str:
    lines = [
        (
            each.name,
            f"{each.modules:,}",
            f"{each.rows:,}",
            format_bytes(each.client_bytes),
            format_bytes(each.header_bytes),
            format_bytes(each.client_bytes),
            format_bytes(each.dense_bytes),
            format_bytes(each.handout_bytes),
            f"{each.fold_flops:.2g}",
            f"{each.decompose_flops:.2g}",
            f"{each.sketch_flops:.2g}",
        )
        for each in federations
    ]
    head = (
        "", "modules", "R", "read", "headers", "held as a stack", "held as dW", "written",
        "flops: B A into dW", "SVD of dW", "SVD of the stack",
    )  # fmt: skip
    return table(head, lines)


def _rates(federations: Sequence[Federation], rate: dict[str, Rates]) -> str:
    lines = [
        (
            each.name,
            f"{format_bytes(rate[each.name].moved)}/s",
            format_seconds(rate[each.name].client),
            f"{format_bytes(rate[each.name].copied)}/s",
            *(
                f"{flops / 1e9:.0f} GFLOP/s"
                for flops in (rate[each.name].fold, rate[each.name].decompose, rate[each.name].sketch)
            ),
            f"`{each.case.name}`",
        )
        for each in federations
    ]
    head = (
        "rates", "files", "a client beside", "memory copy", "B A into dW", "SVD of dW",
        "SVD of the stack", "products of",
    )  # fmt: skip
    return table(head, lines)


def _sharded_by_module(federations: Sequence[Federation], rate: dict[str, Rates]) -> str:
    lines = []
    for each in federations:
        for machines in MACHINES:
            share, busy = each.share(machines), seconds(each, rate[each.name], machines)
            lines.append(
                (
                    each.name,
                    str(machines),
                    format_bytes(each.client_bytes * share + each.header_bytes),
                    format_bytes(each.dense_bytes * share),
                    format_bytes(each.handout_bytes * share),
                    *map(duration, (busy.open, busy.move, busy.fold, busy.decompose, busy.total)),
                )
            )
    head = (
        "", "machines", "read", "held", "written", "opening", "reading and writing", "B A into dW",
        "SVD", "in all",
    )  # fmt: skip
    return table(head, lines)


def _sharded_by_client(federations: Sequence[Federation]) -> str:
    lines = []
    for each in federations:
        for machines in MACHINES[1:]:
            others = (machines - 1) / machines
            lines.append(
                (
                    each.name,
                    str(machines),
                    format_bytes(each.client_bytes / machines),
                    f"{format_bytes(each.dense_bytes * others)}, "
                    f"with {format_bytes(each.dense_bytes)} held",
                    f"{format_bytes(each.client_bytes / machines * others)}, "
                    f"with {format_bytes(each.client_bytes / machines)} held",
                    f"{format_bytes(each.condensed_bytes)}; the root receives "
                    f"{format_bytes(each.condensed_bytes * (machines - 1))}",
                )
            )
    head = ("", "machines", "read", "reduce_scatter of dW", "stacks by module", "condensed states")
    return table(head, lines)


def _limit(federation: Federation, rate: Rates) -> str:
    """Where the limit lies, in sentences."""
    one, widest = seconds(federation, rate, 1), federation.widest
    parts = {
        "opening files": one.open,
        "reading and writing": one.move,
        "adding B A into dW": one.fold,
        "the SVD": one.decompose,
    }
    what, most = max(parts.items(), key=lambda item: item[1])
    flops = duration(federation.fold_flops / rate.fold)
    in_memory = duration(federation.fold_bytes / rate.copied)
    needed = machines_for(federation, rate, HOUR)
    within = (
        "No number of machines of this kind is done within an hour"
        if needed is None
        else f"An hour is enough for {needed} machine{'s' * (needed > 1)} of this kind"
    )
    at_best = duration(seconds(federation, rate, widest).total)
    crossing = 2 * federation.entries / federation.ends
    larger = federation.client_bytes / federation.dense_bytes
    return (
        f"**{federation.name}.** The limit is {what}: {100 * most / one.total:.0f}% of the "
        f"{duration(one.total)} that one machine takes. A client is added as it comes, and dW, read and "
        f"written for each, takes {in_memory} at the rate of a memory copy; the flops take {flops}. "
        f"{within}. A module is on one machine, so at most {widest} share the work, in {at_best}; past "
        f"them only faster machines help. The stack is larger than dW from R = {crossing:,.0f} on, and "
        f"would be {larger:.3g} times as large here: sums are dense, and what is held does not grow "
        "with the clients."
    )


def duration(amount: float) -> str:
    """Seconds, minutes, hours or days."""
    for size, unit, least in ((86400.0, "days", 2.0), (HOUR, "h", 2.0), (60.0, "min", 2.0)):
        if amount >= least * size:
            return f"{amount / size:.3g} {unit}"
    return format_seconds(amount)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options and writes, or checks, the README."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", help="rows are of the first that has them")
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--print", action="store_true", help="print the section instead")
    options = parser.parse_args(arguments)
    section = page(options.records)
    if options.print:
        print(section)
    else:
        rewrite(README, BEGIN, END, section, check=options.check)


if __name__ == "__main__":
    main()
