"""What runs of several methods under several seeds say together: the arithmetic, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastagg.federated.report.recorded_run import RecordedRun

REFERENCE = "zeropad"  # what the differences are from


def compared(rate: float, runs: Mapping[int, Sequence[RecordedRun]]) -> dict[str, Any]:
    """All figures of seed -> its runs, the same methods under each, at one learning rate.

    ``losses`` are held-out, in nats per token over all clients' examples: long answers make them up.
    ``client_losses`` are the means of the clients' own losses, in which each client counts alike. The
    distances are from the server's own sum, see :mod:`bench.federated_handouts`.
    """
    by_method: dict[str, list[RecordedRun]] = {}
    for found in runs.values():
        for run in found:
            by_method.setdefault(run.method, []).append(run)
    rows = [_row(method, of) for method, of in by_method.items()]
    reference = next((row for row in rows if row["name"] == REFERENCE), None)
    for row in rows:
        for kind in ("losses", "client_losses"):
            row[f"{kind}_below_reference"] = reference and _below(row[kind], reference[kind])
    return {
        "case": "held-out loss by method",
        "learning_rate": rate,
        "seeds": list(runs),
        "reference": REFERENCE,
        "rows": rows,
    }


def _row(method: str, runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """Lists have an entry a run; those of losses an entry a round in it, the first before any."""
    return {
        "name": method,
        "losses": [[row.loss for row in run.rounds if row.loss is not None] for run in runs],
        "client_losses": [
            [statistics.fmean(losses) for losses in run.held_out_losses().values()] for run in runs
        ],
        "distance": [_distance(run, "distance") for run in runs],
        "optimal_distance": [_distance(run, "optimal_distance") for run in runs],
        "aggregation_share": [_aggregation_share(run) for run in runs],
    }


def _below(losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> list[float]:
    """How far each run's last loss lies below that of the reference's run under the same seed."""
    return [theirs[-1] - own[-1] for own, theirs in zip(losses, reference, strict=True)]


def _distance(run: RecordedRun, field: str) -> float | None:
    """The mean over clients, after the last round; None where it was not measured."""
    last = max(row.round for row in run.rounds)
    values = [getattr(row, field) for row in run.clients if row.round == last]
    return statistics.fmean(values) if values and None not in values else None


def _aggregation_share(run: RecordedRun) -> float:
    """Of all rounds' seconds without those of evaluation."""
    seconds = [row.seconds for row in run.trained]
    return sum(each.aggregate for each in seconds) / sum(each.total - each.evaluate for each in seconds)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records for people, in Markdown: means over the seeds ± half the range between them."""
    first = records[0]
    rounds = range(1, len(first["rows"][0]["losses"][0]))
    compare = any(row["losses_below_reference"] for row in first["rows"])
    headings = ["method", "learning rate", "before", *(f"round {number}" for number in rounds)]
    headings += [f"below `{first['reference']}`"] * compare
    headings += ["mean of clients"] + [f"below `{first['reference']}`"] * compare
    headings += ["aggregation"]
    lines = [
        f"Held-out loss in nats per byte, seeds {', '.join(map(str, first['seeds']))}",
        "",
        _line(headings),
        "|" + "---|" * len(headings),
    ]
    for record in records:
        for row in record["rows"]:
            cells = [f"`{row['name']}`", f"{record['learning_rate']:g}"]
            cells += [spread(losses) for losses in zip(*row["losses"], strict=True)]
            cells += [by_seed(row["losses_below_reference"])] * compare
            cells += [spread([losses[-1] for losses in row["client_losses"]])]
            cells += [by_seed(row["client_losses_below_reference"])] * compare
            cells += [f"{max(row['aggregation_share']):.2%}"]
            lines.append(_line(cells))
    return "\n".join(lines)


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """``mean ± half the range``; a dash where a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "–"
    half = (max(known) - min(known)) / 2
    return f"{statistics.fmean(known):.{digits}f} ± {half:.{digits}f}"


def by_seed(values: Sequence[float] | None) -> str:
    """Each seed's difference, with its sign."""
    return "–" if values is None else ", ".join(f"{value:+.2f}" for value in values)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
