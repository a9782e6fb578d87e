"""What clients are handed after the first round, beside the exact dW of the very same updates.

All methods of a run begin with the same adapters and batches, so that in the first round the clients'
updates are the same bits whatever the method. FLoRA hands their sum on exactly: it is the reference.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.federated_losses import spread
from fastagg.adapter import Adapter
from fastagg.federated.simulation.run_folder import RunFolder

EXACT = "flora"


def compared(rate: float, folders: Mapping[int, Path], methods: Sequence[str]) -> dict[str, Any]:
    """Means over the clients, of seed -> the folder of its runs.

    ``distance`` is |received - dW| / |dW| over all modules, ``along`` the share of dW that is received:
    <received, dW> / |dW|^2.
    """
    rows = []
    for method in methods:
        if method != EXACT:
            found = [_first_round(folder, method) for folder in folders.values()]
            distances, along = zip(*found, strict=True)
            rows.append({"name": method, "distance": distances, "along": along})
    return {
        "case": "hand-outs of the first round beside dW",
        "learning_rate": rate,
        "seeds": list(folders),
        "rows": rows,
    }


def _first_round(folder: Path, method: str) -> tuple[float, float]:
    exact = Adapter.load(RunFolder(folder / EXACT).merged(1))
    deltas = {module: exact.delta(module).double() for module in exact.modules}
    norm2 = sum(float(delta.square().sum()) for delta in deltas.values())
    distances, along = [], []
    for client in sorted((RunFolder(folder / method).round(1) / "adapters").iterdir()):
        received = Adapter.load(client)
        off2 = inner = 0.0
        for module, delta in deltas.items():
            own = received.delta(module).double()
            off2 += float((own - delta).square().sum())
            inner += float((own * delta).sum())
        distances.append((off2 / norm2) ** 0.5)
        along.append(inner / norm2)
    return statistics.fmean(distances), statistics.fmean(along)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records for people, in Markdown: means over the seeds ± half the range between them."""
    lines = [
        "Received after the first round, by the exact dW of the same updates",
        "",
        "| method | learning rate | distance | share of dW |",
        "|---|---|---|---|",
    ]
    for record in records:
        for row in record["rows"]:
            figures = f"{spread(row['distance'])} | {spread(row['along'])}"
            lines.append(f"| `{row['name']}` | {record['learning_rate']:g} | {figures} |")
    return "\n".join(lines)
