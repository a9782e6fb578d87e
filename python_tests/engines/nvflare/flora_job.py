"""FLoRA over sites of which some fail: python flora_job.py WORKSPACE SITES ROUNDS [resume]"""

from __future__ import annotations

import sys
from pathlib import Path

from nvflare.recipe import SimEnv

from fastagg.engines.nvflare import FastAggRecipe

workspace, sites, rounds, *resume = sys.argv[1:]
recipe = FastAggRecipe(
    train_script=str(Path(__file__).with_name("site_script.py")),
    train_args=f"{workspace}/record{'-resumed' if resume else ''}",
    num_rounds=int(rounds),
    min_clients=2,
    timeout=20,
    method="flora",
    initial=f"{workspace}/first",
    ranks="ask",
    folder=f"{workspace}/rounds",
    resume=bool(resume),
    weight_field="examples",
)
recipe.execute(SimEnv(num_clients=int(sites), workspace_root=f"{workspace}/simulator"))
