"""The server: every client gets the best approximation of the average at its own rank."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fastagg.engines.flower import FastAggStrategy
from fastagg_flower.model import fresh_adapter

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    run, nodes = context.run_config, int(context.run_config["nodes"])
    strategy = FastAggStrategy(
        str(run["method"]),
        initial=fresh_adapter(str(run["dtype"])),
        folder=str(run["folder"]) or None,
        resume=True,
        min_clients=2,
        min_train_nodes=nodes,
        min_evaluate_nodes=nodes,
        min_available_nodes=nodes,
    )
    strategy.start(grid, num_rounds=int(run["num-server-rounds"]))
