"""report.html: what runs did, in one file that needs neither a server nor a network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fastagg.federated.report.compare import Comparison, compare
from fastagg.federated.report.loss_plot import loss_figure
from fastagg.federated.report.metrics import ClientRow
from fastagg.federated.report.plots import PLOTS, Gallery
from fastagg.federated.report.recorded_run import RecordedRun
from fastagg.federated.report.run_summary import MISSING, columns_for, last, number
from fastagg.plot_style import DARK, LIGHT, Theme, png
from fastagg.whole_file import write_whole

# The policy holds the page to its own content, whatever a client calls itself.
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title><style>{style}</style></head><body><main>
"""
_STYLE = """
:root { --paper: #ffffff; --ground: #f3f5f7; --ink: #1c2430; --faint: #5d6875; --line: #dfe3e8;
  --alarm: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #171b21; --ground: #0f1216; --ink: #e6e9ee;
  --faint: #9aa4b1; --line: #2c323b; --alarm: #ff8a80; } }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; } h1, h2, td { overflow-wrap: break-word; }
.scroll, figure, pre { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .4rem .7rem; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; } tr:last-child td { border: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; } td.n { white-space: nowrap; }
td { max-width: 24rem; }
tr.best td { font-weight: 650; }
.plots { display: grid; gap: 1rem; 
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; padding: .9rem; }
img { display: block; width: 100%; max-width: 38rem; margin: auto; }
figcaption, .note { color: var(--faint); font-size: .88rem; } figcaption { margin-top: .6rem; }
.note { margin: .6rem 0; } .alarm { color: var(--alarm); }
summary { cursor: pointer; margin: 1rem 0 .5rem; }
pre { padding: .9rem; overflow-x: auto; font-size: .85rem; margin: 0; }
"""


def write_report(paths: Sequence[Path], file: Path) -> None:
    """Writes the report of one run, or of several side by side; whole or not at all.

    Args:
        paths: as :func:`fastagg.federated.report.recorded_run.read_runs` takes them.

    Raises:
        InvalidInput: see there.
    """
    write_whole(file, report(compare(paths)))


def report(comparison: Comparison, gallery: Gallery | None = None) -> str:
    """The page. Text from the runs' folders is escaped; it may hold anything."""
    gallery, runs = gallery or Gallery(), comparison.runs
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    parts = [_HEAD.format(title=escape(title), style=_STYLE), f"<h1>{escape(title)}</h1>"]
    parts.append(_headline(comparison))
    if len(runs) > 1:
        parts.append(_differences(comparison))
        parts.append(f'<div class="plots">{_picture_of_all(runs)}</div>')
    parts += [_run(run, gallery, alone=len(runs) == 1) for run in runs]
    parts.append("</main></body></html>\n")
    return "\n".join(part for part in parts if part)


def _headline(comparison: Comparison) -> str:
    columns = columns_for(comparison.summaries)
    best = comparison.best if len(comparison.summaries) > 1 else None
    rows = [[column.text(run) for column in columns] for run in comparison.summaries]
    marked = [run is best for run in comparison.summaries]
    numeric = [column.numeric for column in columns]
    table = _table([column.heading for column in columns], rows, numeric, marked)
    note = (
        "Losses are of held-out examples, in nats per token of the answer; time and bytes are totals. "
        "Distances are relative, from the exact sum dW of a round's updates, or what a server optimiser "
        "makes of it."
    )
    return f'{table}<p class="note">{note}</p>'


def _differences(comparison: Comparison) -> str:
    found = comparison.differing_settings()
    if not found:
        return '<p class="note">All settings but the method are the same.</p>'
    rows = [[name, *values] for name, values in found.items()]
    headings = ["setting", *(run.label for run in comparison.runs)]
    return f"<h3>Settings that differ</h3>{_table(headings, rows)}"


def _run(run: RecordedRun, gallery: Gallery, *, alone: bool) -> str:
    """A run's section; beside others its losses are in the figure of all."""
    parts = ["" if alone else f"<h2>{escape(run.label)}</h2>"]
    parts += [f'<p class="note alarm">Note: {escape(note)}.</p>' for note in run.notes]
    drawn, missing = [], []
    for plot in PLOTS:
        if plot.name == "loss" and not alone:
            continue
        pictures = [(theme, gallery.picture(plot, run, theme)) for theme in (LIGHT, DARK)]
        bytes_of = {theme: picture for theme, picture in pictures if picture is not None}
        if bytes_of:
            drawn.append(_figure(bytes_of, plot.caption))
        else:
            missing.append(plot.name)
    parts.append(f'<div class="plots">{"".join(drawn)}</div>' if drawn else "")
    if missing:
        parts.append(f'<p class="note">Not recorded in this run: {", ".join(missing)}.</p>')
    parts += [_failures(run), _clients(run), _config(run)]
    return "\n".join(part for part in parts if part)


def _picture_of_all(runs: Sequence[RecordedRun]) -> str:
    figures = {theme: loss_figure(runs, theme) for theme in (LIGHT, DARK)}
    drawn = {theme: png(figure) for theme, figure in figures.items() if figure is not None}
    return _figure(drawn, "Held-out loss by round of all runs.") if drawn else ""


def _figure(pictures: dict[Theme, bytes], caption: str) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(pictures[theme]).decode()}" for theme in (LIGHT, DARK)
    )
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(caption)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _failures(run: RecordedRun) -> str:
    rows = [
        [str(row.round), client, reason]
        for row in run.rounds
        for client, reason in sorted(row.failures.items())
    ]
    if not rows:
        return '<p class="note">No client failed.</p>'
    return f"<h3>Failures</h3>{_table(['round', 'client', 'reason'], rows, [True, False, False])}"


def _clients(run: RecordedRun) -> str:
    if not run.clients:
        return ""
    rows_of: dict[str, list[ClientRow]] = {name: [] for name in run.client_names}
    for row in sorted(run.clients, key=lambda row: row.round):
        rows_of[row.client].append(row)
    headings = ["client", "rank", "rounds trained", "train loss", "held-out before", "held-out after",
                "distance from dW", "least at its rank"]  # fmt: skip
    rows = [
        [
            name,
            str(last(row.rank for row in mine) or MISSING),
            str(sum(row.participated and row.round > 0 for row in mine)),
            number(last(row.train_loss for row in mine)),
            number(last(row.held_out_loss for row in reversed(mine))),
            number(last(row.held_out_loss for row in mine)),
            number(last(row.distance for row in mine), ".3g"),
            number(last(row.optimal_distance for row in mine), ".3g"),
        ]
        for name, mine in rows_of.items()
    ]
    table = _table(headings, rows, [False] + [True] * 7)
    return f"<details><summary>Clients ({len(rows)})</summary>{table}</details>"


def _config(run: RecordedRun) -> str:
    if not run.config:
        return ""
    return f"<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>"


def _table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    numeric: Sequence[bool] = (),
    marked: Sequence[bool] = (),
) -> str:
    kinds = [' class="n"' if right else "" for right in numeric] or [""] * len(headings)
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, headings, strict=True))
    body = ""
    for place, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, row, strict=True))
        body += (
            f'<tr class="best">{cells}</tr>' if any(marked[place : place + 1]) else f"<tr>{cells}</tr>"
        )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
