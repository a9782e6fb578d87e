"""A workload's clients on disk, as PEFT writes them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from safetensors.torch import save_file
from torch import Tensor

from fastagg.bench.workload import SCALING, Workload

__all__ = ["ClientFolders", "clients_on_disk"]

PREFIX = "base_model.model.model"


class ClientFolders:
    """A folder for each client, and its weight; they go when this goes."""

    def __init__(self, workload: Workload) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="fastagg-bench-")
        self.path = Path(self._kept.name)
        self.folders = [
            self._write(workload, client) for client in range(len(workload.buckets[0].ranks))
        ]
        self.weights = [share / SCALING for share in workload.buckets[0].shares]

    @property
    def files(self) -> list[Path]:
        """The files of tensors, client by client."""
        return [folder / "adapter_model.safetensors" for folder in self.folders]

    def _write(self, workload: Workload, client: int) -> Path:
        tensors: dict[str, Tensor] = {}
        for bucket in workload.buckets:
            for index, name in enumerate(bucket.names):
                module = bucket.module(index)
                tensors[f"{PREFIX}.{name}.lora_A.weight"] = module.As[client].cpu()
                tensors[f"{PREFIX}.{name}.lora_B.weight"] = module.Bs[client].cpu()
        folder = self.path / f"client-{client:04d}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(_config(workload, client)))
        return folder


def _config(workload: Workload, client: int) -> dict[str, Any]:
    projections = workload.case.projections
    rank = projections[0].ranks[client]
    others = {p.name: p.ranks[client] for p in projections if p.ranks[client] != rank}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "benchmark",
        "r": rank,
        "lora_alpha": SCALING * rank,
        "rank_pattern": others,
        "alpha_pattern": {name: SCALING * other for name, other in others.items()},
        "target_modules": [p.name.split(".")[-1] for p in projections],
        "lora_dropout": 0.0,
        "bias": "none",
    }


_WRITTEN: WeakKeyDictionary[Workload, ClientFolders] = WeakKeyDictionary()


def clients_on_disk(workload: Workload) -> ClientFolders:
    """Of this workload, written once while it lives."""
    if workload not in _WRITTEN:
        _WRITTEN[workload] = ClientFolders(workload)
    return _WRITTEN[workload]
