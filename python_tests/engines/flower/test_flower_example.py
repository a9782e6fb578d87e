"""The example app over a grid in this process: every method trains, and FLoRA's clients merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
pytest.importorskip("transformers")


from flower_processes import APP
from flwr.app import Context, RecordDict
from node_grid import NodeGrid


def config_of_the_app() -> dict[str, Any]:
    import tomllib

    project = tomllib.loads((APP / "pyproject.toml").read_text())
    return project["tool"]["flwr"]["app"]["config"]  # type: ignore[no-any-return]


class Node:
    """A node that runs the app of the example."""

    def app(self) -> Any:
        from fastagg_flower.client_app import app

        return app


def played(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the app's two sides; returns the result of the strategy's start()."""
    monkeypatch.syspath_prepend(str(APP))
    from fastagg_flower import server_app

    from fastagg.engines.flower import FastAggStrategy

    found: dict[str, Any] = {}
    start = FastAggStrategy.start

    def noting(strategy: FastAggStrategy, *args: Any, **kwargs: Any) -> Any:
        found["strategy"] = strategy
        found["result"] = start(strategy, *args, **kwargs)
        return found["result"]

    monkeypatch.setattr(FastAggStrategy, "start", noting)
    run_config = config_of_the_app() | settings
    grid = NodeGrid({number: Node() for number in range(30, 34)})  # type: ignore[misc]
    for number, node in enumerate(grid.contexts):
        grid.contexts[node] = Context(1, node, {"partition-id": number}, RecordDict(), run_config)
    server_app.app(grid, Context(1, 1, {}, RecordDict(), run_config))
    return found


@pytest.mark.parametrize("method", ["flexlora", "flora", "zeropad", "hetlora"])
def test_every_method_of_the_example_learns(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = played({"method": method, "num-server-rounds": 3}, monkeypatch)
    assert not found["strategy"].failures
    losses = [record["loss"] for record in found["result"].evaluate_metrics_clientapp.values()]
    assert len(losses) == 3 and losses[2] < losses[0]


def test_floras_clients_have_the_sum_of_all_stacks_in_their_base_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "flora", "num-server-rounds": 2, "keep": str(tmp_path), "dtype": "float32"}
    played(settings, monkeypatch)
    from fastagg_flower import model as tiny

    import fastagg
    from fastagg.engines.flower import Received

    own = tmp_path / "client-3"
    stacks = [fastagg.Adapter.load(own / "round-2" / f"stack-{number}") for number in (1, 2)]
    merged = Received(2, 16, None, tuple(enumerate(stacks, start=1))).merge_into(tiny.base_model())
    base = tiny.base_model().state_dict()
    for module in stacks[0].modules:
        total = base[f"{module}.weight"].double()
        for number in (1, 2):
            for client in range(4):
                sent = fastagg.Adapter.load(tmp_path / f"client-{client}" / f"round-{number}" / "sent")
                a, b = (factor.double() for factor in sent.factors(module))
                total = total + (client + 1) / 10 * sent.scaling(module) * b @ a
        weight = merged.state_dict()[f"{module}.weight"].double()
        assert (weight - total).norm() <= 1e-6 * total.norm()
        assert (total - base[f"{module}.weight"]).norm() > 1e-3 * total.norm()
