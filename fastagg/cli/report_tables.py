"""The tables of `fastagg aggregate`: what was done, or what would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fastagg.byte_sizes import format_bytes
from fastagg.cli.tables import facts, table

if TYPE_CHECKING:
    from fastagg.folders.preview import ModulePreview, Preview
    from fastagg.report import ModuleReport, Report

# A dry run sums more modules than this up by shape and route.
_MODULES_SHOWN = 40


def report_tables(report: Report, out: str) -> list[Table]:
    """What an aggregation did: for each module, for each client, in total."""
    clients = table(
        "Clients",
        *("client", "weight", "rank", "sent", "gets", "bytes"),
        right=("weight", "rank", "sent", "bytes"),
    )
    for client in report.clients:
        clients.add_row(
            escape(client.client),
            f"{client.weight:g}",
            str(client.rank),
            format_bytes(client.bytes),
            escape(client.handout or "-"),
            "-" if client.handout_bytes is None else format_bytes(client.handout_bytes),
        )
    summary = facts(
        f"Aggregated by {report.method}",
        {
            "written": f"{out}: {format_bytes(report.bytes_written)}",
            "read": format_bytes(report.bytes_read),
            "accumulator": report.accumulator,
            "peak memory": f"{format_bytes(report.peak_memory)} ({report.peak_memory_of})",
            "seconds": _stages(report.seconds),
            "condensing cost": _condensing(report.modules),
            "base weights": report.base_effect,
            "averaged plainly": ", ".join(report.whole_tensors) or "-",
            "left out": ", ".join(client.client for client in report.skipped) or "-",
        },
    )
    return [_modules_table(report.modules), clients, summary]


def preview_tables(preview: Preview) -> list[Table]:
    """What an aggregation would do."""
    budget = preview.memory_budget
    summary = facts(
        f"Dry run of {preview.method}: nothing was written",
        {
            "out": preview.out,
            "accumulator": preview.accumulator,
            "memory needed": format_bytes(preview.memory)
            + ("" if budget is None else f" of {format_bytes(budget)} allowed"),
            "modules": len(preview.modules),
            "left out": ", ".join(client.client for client in preview.skipped) or "-",
        },
    )
    clients = table(
        "Clients",
        *("client", "folder", "weight", "ranks", "modules", "bytes"),
        right=("weight", "modules", "bytes"),
    )
    for client in preview.clients:
        clients.add_row(
            escape(client.client),
            escape(client.folder),
            f"{client.weight:g}",
            ", ".join(map(str, client.ranks)),
            str(client.modules),
            format_bytes(client.bytes),
        )
    modules = table("Modules", "modules", "shape", "clients", "R", "route", right=("clients", "R"))
    for names, module in _grouped(preview.modules):
        modules.add_row(
            escape(_named(names)),
            " x ".join(map(str, module.shape)),
            str(module.clients),
            str(module.rank_sum),
            module.route,
        )
    folders = table("Would be written", "folder", "ranks", "bytes", "for clients", right=("bytes",))
    for folder in preview.folders:
        folders.add_row(
            escape(f"{preview.out}/{folder.folder}"),
            ", ".join(map(str, folder.ranks)),
            format_bytes(folder.bytes),
            escape(", ".join(folder.clients)),
        )
    return [clients, modules, folders, summary]


def _modules_table(modules: Sequence[ModuleReport]) -> Table:
    """A line per module; names without the prefix that all have, shares at a few of the ranks."""
    ranks = _some(sorted({rank for module in modules for rank in module.kept}))
    made = Table(
        title="Modules",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("module", "shape"):
        made.add_column(name, no_wrap=True)
    for name in ("K", "R"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("route", no_wrap=True)
    made.add_column("s", justify="right", no_wrap=True)
    made.add_column(f"kept at rank {', '.join(map(str, ranks))}", min_width=6)
    made.add_column("certi-\nficate", justify="right", no_wrap=True)
    prefix = _common_prefix([module.module for module in modules])
    for module in modules:
        made.add_row(
            escape(module.module[len(prefix) :]),
            "x".join(map(str, module.shape)),
            str(module.clients),
            str(module.rank_sum),
            escape(module.route or "-"),
            f"{module.seconds:.3f}",
            " ".join(_figure(module.kept.get(rank), ".3f") for rank in ranks),
            _figure(module.certificate, ".1e"),
        )
    made.caption = (
        "K clients, R the sum of their ranks, s seconds, kept: share of |dW|^2, certificate: bound of "
        "(error^2 - optimal^2) / |dW|^2" + (f"; all names begin with {escape(prefix)}" if prefix else "")
    )
    made.caption_justify = "left"
    return made


def _condensing(modules: Sequence[ModuleReport]) -> str:
    """What condensing cost the module that it cost most."""
    errors = [module.condensed_error for module in modules if module.condensed_error]
    return f"at most {max(errors):.1e} |dW| of a module" if errors else "-"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _some(ranks: Sequence[int], most: int = 5) -> list[int]:
    """At most so many of the ranks, the smallest and the largest among them."""
    if len(ranks) <= most:
        return list(ranks)
    return [ranks[i * (len(ranks) - 1) // (most - 1)] for i in range(most)]


def _common_prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    length = next((i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), 0)
    return first[: first.rfind(".", 0, length) + 1]


def _grouped(modules: Sequence[ModulePreview]) -> list[tuple[list[str], ModulePreview]]:
    if len(modules) <= _MODULES_SHOWN:
        return [([module.module], module) for module in modules]
    groups: dict[tuple[object, ...], tuple[list[str], ModulePreview]] = {}
    for module in modules:
        key = (module.shape, module.clients, module.rank_sum, module.route)
        groups.setdefault(key, ([], module))[0].append(module.module)
    return list(groups.values())


def _named(names: Sequence[str]) -> str:
    """Some module names in a line: "q_proj, v_proj (64 modules)"."""
    if len(names) == 1:
        return names[0]
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return f"{', '.join(leaves)} ({len(names)} modules)"


def _stages(seconds: dict[str, float]) -> str:
    spent = [f"{name} {value:.2f}" for name, value in seconds.items() if value >= 0.005]
    return f"{sum(seconds.values()):.2f}" + (f" ({', '.join(spent)})" if spent else "")
