"""A site that only seems to train: fast to start, and it fails as its number says.

    site-1, site-2: rank 2 and 8, weight 1 and 2     site-4: crashes in the first round
    site-3: its factors are NaN                      site-5: rank 4, weight 5; silent in the second round
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nvflare.client as flare
import torch
from nvflare.app_common.abstract.fl_model import FLModel

RECORD = Path(sys.argv[1])
RANKS = {1: 2, 2: 8, 3: 4, 4: 4, 5: 4}

flare.init()
name = flare.get_site_name()
site = int(name.rpartition("-")[2])
rank = RANKS[site]
config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q", "v"]}
while flare.is_running():
    received = flare.receive()
    if received is None:
        break
    if received.meta.get("fastagg.ask"):
        flare.send(FLModel(params={}, meta={"adapter_config": config}))
        continue
    number = received.current_round
    if site == 4:
        raise RuntimeError("out of memory, for example")
    if site == 5 and number == 1:
        while flare.is_running():
            time.sleep(0.2)
    generator = torch.Generator().manual_seed(100 * number + site)
    params = {}
    for module, (m, n) in {"layers.0.q": (24, 16), "layers.0.v": (10, 16)}.items():
        a, b = torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
        params[f"base_model.model.{module}.lora_A.weight"] = a.bfloat16()
        params[f"base_model.model.{module}.lora_B.weight"] = b.bfloat16()
    if site == 3:
        params["base_model.model.layers.0.v.lora_B.weight"][0, 0] = float("nan")
    folder = RECORD / f"round-{number}" / name
    folder.mkdir(parents=True)
    torch.save({"params": dict(received.params), "meta": received.meta}, folder / "received.pt")
    torch.save(params, folder / "sent.pt")
    flare.send(FLModel(params=params, meta={"examples": site, "adapter_config": config}))
