"""The tables that people see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fastagg.byte_sizes import format_bytes

if TYPE_CHECKING:
    from fastagg.checkpoint import MergeReport
    from fastagg.folders.inspection import AdapterMeasures, ModuleMeasures
    from fastagg.folders.validation import Validation, Verdict

_TITLE: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}


def table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table with its headings, those in `right` aligned to the right."""
    made = Table(title=escape(title), min_width=len(title), **_TITLE)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def facts(title: str, rows: Mapping[str, object]) -> Table:
    """A table of names and values."""
    made = Table(title=escape(title), min_width=len(title), show_header=False, **_TITLE)
    made.add_column(style="cyan")
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(escape(name), escape(str(value)))
    return made


def merge_table(report: MergeReport) -> Table:
    """What a merge did."""
    rows: dict[str, object] = {
        "base": report.base,
        "adapter": report.adapter or "-",
        "written": f"{report.out}: {len(report.shards)} shard(s), {format_bytes(report.nbytes)}",
        "merged": f"{len(report.merged)} modules",
        "replaced": ", ".join(report.replaced) or "-",
        "added": ", ".join(report.added) or "-",
        "left out": ", ".join(report.left_out) or "-",
        "seconds": f"{report.seconds:.2f}",
    }
    return facts("Merged", rows)


def adapters_table(measured: Sequence[AdapterMeasures]) -> Table:
    """A line per adapter."""
    made = table(
        "Adapters",
        *("adapter", "base model", "modules", "ranks", "scalings", "dtypes", "parameters"),
        *("bytes", "|dW|_F", "NaN, Inf"),
        right=("modules", "parameters", "bytes", "|dW|_F", "NaN, Inf"),
    )
    for item in measured:
        made.add_row(
            escape(item.name),
            escape(item.base_model or "-"),
            str(len(item.modules)),
            _values(item.ranks),
            _values(item.scalings),
            _values(item.dtypes),
            f"{item.parameters:,}",
            format_bytes(item.nbytes),
            _norm(item.norm),
            str(item.nonfinite or "-"),
        )
    return made


def modules_table(item: AdapterMeasures) -> Table:
    """A line per module of one adapter, with its spectrum where it was measured."""
    spectra = any(module.spectrum is not None for module in item.modules)
    columns = ["module", "kind", "shape", "rank", "scaling", "dtypes", "|dW|_F"]
    if spectra:
        columns += ["effective\nrank", "stable\nrank", "rank for\n90%, 99%", "singular values"]
    made = table(f"{item.name}: modules", *columns, right=("rank", "scaling", "|dW|_F", *columns[7:10]))
    for module in item.modules:
        cells = [
            module.module,
            module.kind,
            " x ".join(map(str, module.shape)),
            str(module.rank),
            f"{module.scaling:.6g}",
            ", ".join(dict.fromkeys(module.dtypes)),
            _norm(module.norm),
        ]
        made.add_row(*map(escape, cells + (_spectrum_cells(module) if spectra else [])))
    return made


def validation_table(validation: Validation) -> Table:
    """A verdict per folder, and one on all of them."""
    made = table("Validation", "client", "verdict", "modules", "ranks", "dtypes", "base model")
    for verdict in validation.verdicts:
        made.add_row(
            escape(verdict.client),
            _verdict(verdict),
            str(verdict.modules or "-"),
            ", ".join(map(str, verdict.ranks)) or "-",
            ", ".join(verdict.dtypes) or "-",
            escape(verdict.base_model or "-"),
        )
    ranks = "equal ranks" if validation.equal_ranks else "different ranks (fedit refuses them)"
    made.caption_justify = "left"
    made.caption = (
        f"[green]these adapters can be aggregated together[/]; {ranks}"
        if validation.together
        else "[red]these adapters cannot be aggregated together[/]"
    )
    return made


def info_tables(report: Mapping[str, Any]) -> list[Table]:
    """The environment: versions, hardware, libraries, kernels."""
    tables = [
        facts(
            "fastagg",
            {
                "fastagg": report["fastagg"] or "not installed",
                "python": f"{report['python']['version']} ({report['python']['executable']})",
                "platform": report["platform"],
                **{name: found or "not installed" for name, found in report["packages"].items()},
                **report["variables"],
            },
        ),
        facts("CPU", _readable(report["cpu"])),
        facts("torch", _readable(report["torch"])),
        facts("GPUs", _gpus(report["gpus"])),
        facts("CUDA kernels", _readable(report["cuda"])),
    ]
    libraries = report["libraries"]
    if "error" in libraries:
        return [*tables, facts("Libraries", libraries), facts("Kernels", report["ops"])]
    loaded = table("Libraries", "library", "loaded", "path", "why not")
    for name, found in libraries.items():
        if name != "build":
            state = "[green]yes[/]" if found["loaded"] else "[yellow]no[/]"
            loaded.add_row(name, state, escape(found["path"]), escape(found["error"] or "-"))
    return [
        *tables,
        loaded,
        facts("Build", libraries.get("build") or {"build": "unknown: _host is not loaded"}),
        _kernels(report["ops"]),
    ]


def _kernels(ops: Mapping[str, Any]) -> Table:
    if "error" in ops:
        return facts("Kernels", ops)
    backends = list(dict.fromkeys(key for kernels in ops.values() for key in kernels))
    made = table("Kernels", "op", *backends)
    for op, kernels in ops.items():
        made.add_row(op, *("[green]yes[/]" if kernels[key] else "-" for key in backends))
    return made


def _gpus(gpus: Any) -> Mapping[str, object]:
    if isinstance(gpus, dict):
        return gpus
    return {
        str(index): f"{gpu['name']}, compute capability {gpu['capability']}, "
        f"{format_bytes(gpu['memory'])}, {gpu['multiprocessors']} multiprocessors; "
        f"{gpu['obstacle'] or 'the CUDA kernels run on it'}"
        for index, gpu in enumerate(gpus)
    } or {"-": "none that torch can use"}


def _readable(part: Mapping[str, Any]) -> dict[str, object]:
    shown: dict[str, object] = {}
    for name, value in part.items():
        if name == "memory" and value is not None:
            value = format_bytes(value)
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "-"
        shown[name.replace("_", " ")] = "-" if value is None else value
    return shown


def _verdict(verdict: Verdict) -> str:
    if verdict.error is not None:
        return f"[red]invalid[/]: {escape(verdict.error)}"
    if verdict.conflict is not None:
        return f"[red]unlike the others[/]: {escape(verdict.conflict)}"
    return "[green]valid[/]"


def _spectrum_cells(module: ModuleMeasures) -> list[str]:
    spectrum = module.spectrum
    if spectrum is None:
        return ["-"] * 4
    values = [f"{value:.3g}" for value in spectrum.singular_values]
    shown = values if len(values) <= 6 else [*values[:4], "..", values[-1]]
    return [
        f"{spectrum.effective_rank:.1f}",
        f"{spectrum.stable_rank:.1f}",
        ", ".join(map(str, spectrum.energy_ranks.values())),
        " ".join(shown),
    ]


def _values(counts: Mapping[str, int]) -> str:
    """The distinct values, with the number of modules of each where there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} (x{count})" for value, count in counts.items()) or "-"


def _norm(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
