"""What runs of several methods under several seeds say together: the arithmetic, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastagg.federated.report.recorded_run import RecordedRun

REFERENCE = "zeropad"  # what the differences are from


def compared(
    rate: float, runs: Mapping[int, Sequence[RecordedRun]], weights: Mapping[str, int]
) -> dict[str, Any]:
    """All figures of seed -> its runs, the same methods under each, at one learning rate.

    ``losses`` are held-out, in nats per token over all clients' answers: the clients of long ones make
    them up. ``weighted_losses`` are means of the clients' own losses by the ``weights`` with which the
    server adds them up: what federated training sets out to lower. The distances are of what clients
    receive from the exact sum of their updates, after the last round.
    """
    by_method: dict[str, list[RecordedRun]] = {}
    for found in runs.values():
        for run in found:
            by_method.setdefault(run.method, []).append(run)
    rows = [_row(method, of, weights) for method, of in by_method.items()]
    reference = next((row for row in rows if row["name"] == REFERENCE), None)
    for row in rows:
        for kind in ("losses", "weighted_losses"):
            row[f"{kind}_below_reference"] = reference and _below(row[kind], reference[kind])
    return {
        "case": "held-out loss by method",
        "learning_rate": rate,
        "seeds": list(runs),
        "reference": REFERENCE,
        "rows": rows,
    }


def _row(method: str, runs: Sequence[RecordedRun], weights: Mapping[str, int]) -> dict[str, Any]:
    """Lists have an entry a run; those of losses an entry a round in it, the first before any."""
    return {
        "name": method,
        "losses": [[row.loss for row in run.rounds if row.loss is not None] for run in runs],
        "weighted_losses": [_weighted(run, weights) for run in runs],
        "distance": [_distance(run, "distance") for run in runs],
        "optimal_distance": [_distance(run, "optimal_distance") for run in runs],
        "aggregation_share": [_aggregation_share(run) for run in runs],
    }


def _weighted(run: RecordedRun, weights: Mapping[str, int]) -> list[float]:
    """By round, as the round's own losses."""
    means = []
    for row in run.rounds:
        if row.loss is None:
            continue
        of = {each.client: each.held_out_loss for each in run.clients if each.round == row.round}
        known = [(weights[name], loss) for name, loss in of.items() if loss is not None]
        means.append(sum(weight * loss for weight, loss in known) / sum(weight for weight, _ in known))
    return means


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
    seeds = ", ".join(map(str, first["seeds"]))
    parts = []
    for kind, meaning in (
        ("weighted_losses", "clients weighted by their examples, as the server weighs them"),
        ("losses", "over the bytes of all answers"),
    ):
        parts.append(f"Held-out loss in nats per byte, {meaning}; seeds {seeds}\n")
        parts += [*_losses_table(records, kind), ""]
    shares = [share for each in records for row in each["rows"] for share in row["aggregation_share"]]
    parts.append(f"Aggregation: at most {max(shares):.2%} of the rounds of a run, without evaluation")
    return "\n".join(parts)


def _losses_table(records: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    rows = records[0]["rows"]
    compare = any(row["losses_below_reference"] for row in rows)
    rounds = [f"round {number}" for number in range(1, len(rows[0]["losses"][0]))]
    headings = ["learning rate", "method", "before", *rounds]
    headings += [f"below `{records[0]['reference']}`, by seed"] * compare
    lines = [_line(headings), "|" + "---|" * len(headings)]
    for record in records:
        for row in record["rows"]:
            cells = [f"{record['learning_rate']:g}", f"`{row['name']}`"]
            cells += [spread(losses) for losses in zip(*row[kind], strict=True)]
            cells += [by_seed(row[f"{kind}_below_reference"])] * compare
            lines.append(_line(cells))
    return lines


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
