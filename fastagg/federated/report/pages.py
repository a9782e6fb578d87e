"""All that is drawn of the runs in one folder: each one's plots and page, and those of them together."""

from __future__ import annotations

from pathlib import Path

from fastagg.federated.report.compare import Comparison
from fastagg.federated.report.html_report import report, write_report
from fastagg.federated.report.plots import write_plots
from fastagg.whole_file import write_whole


def write_pages(comparison: Comparison, folder: Path) -> Path:
    """Writes ``plots/`` and ``report.html`` into each run's own folder, and ``comparison.png`` and
    ``report.html`` of all into ``folder``; what was there is replaced. Returns the latter's path."""
    for run in comparison.runs:
        write_plots(run, run.folder / "plots")
        write_report([run.folder], run.folder / "report.html")
    comparison.write_plot(folder / "comparison.png")
    page = folder / "report.html"
    write_whole(page, report(comparison))
    return page
