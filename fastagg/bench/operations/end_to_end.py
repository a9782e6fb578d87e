"""end-to-end: FlexLoRA from the clients' folders to folders for every rank, as a server does a round."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fastagg import linalg, ops
from fastagg.bench.accuracy import of_approximation
from fastagg.bench.baselines.decomposition import dense_svd, dense_svd_lowrank, qr_core_svd
from fastagg.bench.cases import Case
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.memory import sampled_peak_bytes
from fastagg.bench.operations.client_folders import PREFIX, clients_on_disk
from fastagg.bench.operations.redistribute import outlet_of
from fastagg.bench.operations.slabs import slabs_of
from fastagg.bench.operations.svd import (
    dense_lowrank_work,
    dense_svd_work,
    qr_core_work,
    rank_of,
)
from fastagg.bench.workload import SCALING, Bucket, Workload
from fastagg.folders.rounds import aggregate_folders

__all__ = ["END_TO_END"]

Decompose = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[float], int], tuple[Tensor, Tensor]]


def _distinct(workload: Workload) -> list[Bucket]:
    """A client of each set of ranks over all modules: all others are handed the same folders."""
    kinds: dict[tuple[int, ...], int] = {}
    for client, ranks in enumerate(zip(*(b.ranks for b in workload.buckets), strict=True)):
        kinds.setdefault(ranks, client)
    clients = list(kinds.values())
    return [
        Bucket(
            b.m,
            b.n,
            tuple(b.ranks[k] for k in clients),
            b.names,
            [b.flats[k] for k in clients],
            tuple(b.shares[k] for k in clients),
        )
        for b in workload.buckets
    ]


def _moved(workload: Workload) -> Work:
    """Bytes that are read and written; the limit is measured, not counted."""
    written = sum(flat.nbytes for bucket in _distinct(workload) for flat in bucket.flats)
    return Work(bytes=float(workload.nbytes + written))


@dataclass
class _Outputs:
    """A fresh folder for each run."""

    root: Path
    numbers: Any

    @classmethod
    def beside(cls, workload: Workload, name: str) -> _Outputs:
        root = clients_on_disk(workload).path / name
        root.mkdir(exist_ok=True)
        return cls(root, count())

    def fresh(self) -> Path:
        return self.root / str(next(self.numbers))

    def clean(self) -> None:
        for folder in self.root.iterdir():
            shutil.rmtree(folder)


def _own(workload: Workload) -> Prepared:
    clients = clients_on_disk(workload)
    outputs = _Outputs.beside(workload, "fastagg")

    def run() -> Path:
        out = outputs.fresh()
        aggregate_folders(
            clients.folders,
            out,
            method="flexlora",
            weights=clients.weights,
            device=str(workload.device),
        )
        folder = json.loads((out / "clients.json").read_text())
        return out / _folder_of(folder, clients.folders[0].name)

    return Prepared(run, outputs.clean)


def _folder_of(document: Any, client: str) -> str:
    entry = document.get("clients", document)[client]
    return str(entry["folder"] if isinstance(entry, dict) else entry)


def _baseline(name: str, decompose: Decompose, work: Callable[[Workload], Work]) -> Contender:
    """The same files read and written by safetensors, a decomposition a module."""

    def prepare(workload: Workload) -> Prepared:
        clients = clients_on_disk(workload)
        outputs = _Outputs.beside(workload, name)
        ranks = {bucket: rank_of(workload, bucket) for bucket in workload.buckets}
        kinds = sorted(
            {tuple(b.ranks[k] for b in workload.buckets) for k in range(len(clients.folders))}
        )

        def run() -> Path:
            out = outputs.fresh()
            device = str(workload.device)
            given = [load_file(path, device=device) for path in clients.files]
            c = [SCALING * weight for weight in clients.weights]
            handed: dict[tuple[int, ...], dict[str, Tensor]] = {kind: {} for kind in kinds}
            for place, (bucket, rank) in enumerate(ranks.items()):
                for module in (f"{PREFIX}.{each}" for each in bucket.names):
                    As = [client[f"{module}.lora_A.weight"] for client in given]
                    Bs = [client[f"{module}.lora_B.weight"] for client in given]
                    left, right = decompose(As, Bs, c, rank)
                    for kind, tensors in handed.items():
                        r = kind[place]
                        A, B = right[:r], left[:, :r] / SCALING
                        tensors[f"{module}.lora_A.weight"] = A.to(bucket.dtype).contiguous()
                        tensors[f"{module}.lora_B.weight"] = B.to(bucket.dtype).contiguous()
            for number, tensors in enumerate(handed.values()):
                folder = out / f"kind-{number}"
                folder.mkdir(parents=True)
                save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
                shutil.copy(clients.folders[0] / "adapter_config.json", folder)
            first = tuple(b.ranks[0] for b in workload.buckets)
            return out / f"kind-{kinds.index(first)}"

        return Prepared(run, outputs.clean)

    # The flops are for the scaling of a part to the whole: there is no limit for them here.
    return Contender(
        name,
        "baseline",
        prepare,
        lambda w: Work(bytes=_moved(w).bytes, flops=work(w).flops),
    )


def _sum_of_parts(workload: Workload) -> Prepared:
    """Plain reads of the same bytes, the kernels on factors that are there, plain writes of the same
    bytes, synced as ours are."""
    clients = clients_on_disk(workload)
    outputs = _Outputs.beside(workload, "parts")
    slabs = slabs_of(workload)
    outlets = [outlet_of(bucket) for bucket in _distinct(workload)]
    room = bytearray(max(path.stat().st_size for path in clients.files))

    def run() -> None:
        for path in clients.files:
            with path.open("rb", buffering=0) as file:
                file.readinto(room)
        handed: list[list[Tensor]] = []
        for s, outlet in zip(slabs, outlets, strict=True):
            s.fill()
            found = linalg.svd_of_stack(s.A, s.Bt, s.c, rank_of(workload, s.bucket))
            parts = (found.U, found.S, found.Vt)
            handed.append(ops.redistribute(*parts, outlet.slots, outlet.scalings, sizes=outlet.sizes))
        out = outputs.fresh()
        out.mkdir()
        kinds = max(len(flats) for flats in handed)
        for kind in range(kinds):
            with (out / str(kind)).open("wb", buffering=0) as file:
                for flats in handed:
                    if kind < len(flats):
                        file.write(flats[kind].cpu().numpy().data)
                os.fsync(file.fileno())

    return Prepared(run, outputs.clean)


def _accuracy(workload: Workload, folder: Path) -> Accuracy:
    """Of what the first client is handed, which rounding to its dtype is part of."""
    bucket = workload.buckets[0]
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"{PREFIX}.{bucket.names[0]}"
    left = SCALING * tensors[f"{name}.lora_B.weight"].double()
    right = tensors[f"{name}.lora_A.weight"].double()
    return Accuracy(of_approximation(workload.by_module()[0], left, right).error)


def _contenders(workload: Workload) -> list[Contender]:
    return [
        Contender("fastagg aggregate", "fastagg", _own, _moved),
        _baseline("cat + 2 QR + core SVD", qr_core_svd, qr_core_work),
        _baseline("dense + svd_lowrank", dense_svd_lowrank, dense_lowrank_work),
        _baseline("dense + linalg.svd", dense_svd, dense_svd_work),
        Contender("read, kernels, write: the sum", "limit", _sum_of_parts, _moved),
    ]


def _bytes_per_layer(case: Case, size: int) -> float:
    return case.elements_per_layer * size * 6.0


END_TO_END = Operation(
    "end-to-end",
    "FlexLoRA from folders to folders",
    "(error - optimal error) / |dW| of what the first client is handed, in its dtype",
    _contenders,
    _accuracy,
    _bytes_per_layer,
    sampled_peak_bytes,
)
