"""Several runs side by side: their headline figures, one plot, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastagg.federated.report.loss_plot import loss_figure
from fastagg.federated.report.recorded_run import RecordedRun, read_runs
from fastagg.federated.report.run_summary import RunSummary, summarise
from fastagg.plot_style import png

# Where a run is written, and which methods ran beside it, is no difference between what they did.
_NO_DIFFERENCE = ("output.", "federation.methods")


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they were given, and a summary of each."""

    runs: tuple[RecordedRun, ...]
    summaries: tuple[RunSummary, ...]

    @property
    def best(self) -> RunSummary | None:
        """The run with the least loss after its last round; None where no loss is a number."""
        finished = [run for run in self.summaries if run.loss is not None and run.loss == run.loss]
        return min(finished, key=lambda run: run.loss or 0.0, default=None)

    def differing_settings(self) -> dict[str, tuple[str, ...]]:
        """Dotted name -> its value in each run, where these differ; a run without it has "–"."""
        settings = [run.settings() for run in self.runs]
        names = sorted({name for each in settings for name in each})
        found: dict[str, tuple[str, ...]] = {}
        for name in names:
            values = tuple(str(each.get(name, "–")) for each in settings)
            if len(set(values)) > 1 and not name.startswith(_NO_DIFFERENCE):
                found[name] = values
        return found

    def write_plot(self, path: Path) -> bool:
        """Draws the losses of all runs into one PNG; False, and no file, where no run has a loss.

        Raises:
            OSError: cannot be written.
        """
        figure = loss_figure(self.runs)
        if figure is None:
            return False
        path.write_bytes(png(figure))
        return True


def compare(paths: Sequence[Path]) -> Comparison:
    """Reads the runs; see :func:`fastagg.federated.report.recorded_run.read_runs`."""
    runs = read_runs(paths)
    return Comparison(runs, tuple(summarise(run) for run in runs))
