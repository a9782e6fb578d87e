"""Four sites with adapters of the ranks 2, 4, 8 and 16, in NVFlare's simulator.

    python job.py                  # FastAggController: every site is sent an adapter of its own rank
    python job.py --server fedavg  # NVFlare's FedAvg with FastAggModelAggregator: one global adapter
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=["controller", "fedavg"], default="controller")
    parser.add_argument("--method", default="flexlora", help="flexlora, flora, zeropad, hetlora")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", default="2,4,8,16", help="of site-1, site-2 and so on")
    parser.add_argument("--dtype", default="float32", help="of model and adapters")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"))
    parser.add_argument("--record", type=Path, help="folder for what the sites send and receive")
    arguments = parser.parse_args()
    # The scripts are found from here, and this process and those that it starts are offline.
    arguments.workspace = arguments.workspace.resolve()
    record = f" --record {arguments.record.resolve()}" if arguments.record else ""
    os.chdir(HERE)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    from nvflare.recipe import SimEnv

    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    train_args = f"--ranks {arguments.ranks} --dtype {arguments.dtype}{record}"
    recipe = controller_job if arguments.server == "controller" else fedavg_job
    job = recipe(arguments, ranks, train_args)
    job.execute(SimEnv(num_clients=len(ranks), workspace_root=str(arguments.workspace)))


def controller_job(arguments: argparse.Namespace, ranks: list[int], train_args: str):
    from fastagg.engines.nvflare import FastAggRecipe

    return FastAggRecipe(
        name="fastagg",
        train_script="client.py",
        train_args=train_args,
        num_rounds=arguments.rounds,
        min_clients=len(ranks),
        method=arguments.method,
        enable_tensor_disk_offload=True,
        folder=str(arguments.workspace / "rounds"),
    )


def fedavg_job(arguments: argparse.Namespace, ranks: list[int], train_args: str):
    from model import lora
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat

    from fastagg.engines.nvflare import FastAggModelAggregator

    return FedAvgRecipe(
        name="fedavg",
        model={"class_path": "model.GlobalAdapter", "args": {"rank": max(ranks)}},
        train_script="client.py",
        train_args=train_args,
        num_rounds=arguments.rounds,
        min_clients=len(ranks),
        aggregator=FastAggModelAggregator(lora(max(ranks)), method=arguments.method),
        # Where ranks differ, and for bfloat16, NumPy will not do.
        server_expected_format=ExchangeFormat.PYTORCH,
        enable_tensor_disk_offload=True,
        key_metric="loss",
        key_metric_mode="min",
    )


if __name__ == "__main__":
    main()
