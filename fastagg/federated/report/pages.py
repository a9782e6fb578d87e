"""All that is drawn of the runs in one folder: each one's plots and page, and those of them together."""

from __future__ import annotations

from pathlib import Path

from fastagg.federated.report.compare import Comparison
from fastagg.federated.report.html_report import report
from fastagg.federated.report.plots import Gallery, write_plots
from fastagg.whole_file import write_whole


def write_pages(comparison: Comparison, folder: Path) -> Path:
    """Writes ``plots/`` and ``report.html`` into each run's own folder, and ``comparison.png`` and
    ``report.html`` of all into ``folder``; what was there is replaced. Returns the latter's path."""
    gallery = Gallery()
    for run, summary in zip(comparison.runs, comparison.summaries, strict=True):
        write_plots(run, run.folder / "plots", gallery)
        write_whole(run.folder / "report.html", report(Comparison((run,), (summary,)), gallery))
    comparison.write_plot(folder / "comparison.png")
    page = folder / "report.html"
    write_whole(page, report(comparison, gallery))
    return page
