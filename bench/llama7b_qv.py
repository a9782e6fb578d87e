"""Case llama7b-qv-10: FlexLoRA from folders to folders, 64 modules of 4096 x 4096, ten bf16 adapters of
FLoRA's ranks. The baselines read and write the same files with safetensors."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import fastagg
from bench.accuracy import excess_error
from bench.adapters import FLORA_RANKS, write_clients
from bench.baselines import DECOMPOSITIONS, Decompose
from bench.measure import Timing, summary

SCALING = 2.0  # alpha = 2r
MEASURED_MODULES = {"dense + linalg.svd": 3, "dense + svd_lowrank": 16, "cat + 2 QR + core SVD": 64}


def run(workspace: Path, *, layers: int = 32, size: int = 4096, repetitions: int = 5) -> dict[str, Any]:
    """Times FastAgg and the three baselines, and measures the error of what each wrote."""
    folders = write_clients(workspace / "clients", FLORA_RANKS, layers=layers, size=size)
    weights = [100.0 + 10 * k for k in range(len(folders))]
    seconds: dict[str, list[float]] = {"fastagg": []}
    excess: dict[str, float] = {}
    out = workspace / "out"
    slow = "dense + linalg.svd"
    for repetition in range(repetitions + 1):
        elapsed = _fastagg(folders, weights, out)
        if repetition:
            seconds["fastagg"].append(elapsed)
        excess["fastagg"] = _delivered_excess(folders, weights, out / "rank-64")
        shutil.rmtree(out)
        for name, decompose in DECOMPOSITIONS.items():
            if name == slow and repetition != 1:
                continue  # minutes of work: once, without a warm-up that would change nothing
            if name == "dense + svd_lowrank" and repetition > 3:
                continue
            count = min(MEASURED_MODULES[name], 2 * layers)
            elapsed = _baseline(folders, weights, out, decompose, count)
            if repetition:
                seconds.setdefault(name, []).append(elapsed)
            excess[name] = _delivered_excess(folders, weights, out / "rank-64")
            shutil.rmtree(out)
    times = {name: summary(values) for name, values in seconds.items()}
    return {
        "case": "llama7b-qv-10",
        "modules": 2 * layers,
        "size": size,
        "ranks": list(FLORA_RANKS),
        "rows": [_row(name, times[name], times["fastagg"], excess[name], 2 * layers) for name in times],
        "rounding": "excess errors are of what was delivered, in bfloat16",
        "decomposition_excess": _decomposition_excess(folders, weights),
    }


def _row(name: str, time_: Timing, ours: Timing, excess: float, modules: int) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": time_.median,
        "quartiles": [time_.low, time_.high],
        "repetitions": time_.repetitions,
        "times_slower": time_.median / ours.median,
        "measured_modules": min(MEASURED_MODULES.get(name, modules), modules),
        "delivered_excess": excess,
    }


def _fastagg(folders: Sequence[Path], weights: Sequence[float], out: Path) -> float:
    start = time.perf_counter()
    updates = [
        fastagg.ClientUpdate.load(folder, weight=weight)
        for folder, weight in zip(folders, weights, strict=True)
    ]
    fastagg.aggregate(updates, method="flexlora").save(out)
    return time.perf_counter() - start


def _baseline(
    folders: Sequence[Path], weights: Sequence[float], out: Path, decompose: Decompose, count: int
) -> float:
    """Seconds for all modules; the decompositions of `count` of them are timed and scaled up."""
    start = time.perf_counter()
    clients = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    total = sum(weights)
    c = [SCALING * weight / total for weight in weights]
    modules = sorted(key[: -len(".lora_A.weight")] for key in clients[0] if ".lora_A." in key)
    outputs: dict[int, dict[str, Tensor]] = {rank: {} for rank in sorted(set(FLORA_RANKS))}
    decomposing = 0.0
    for number, module in enumerate(modules):
        As = [client[f"{module}.lora_A.weight"] for client in clients]
        Bs = [client[f"{module}.lora_B.weight"] for client in clients]
        began = time.perf_counter()
        if number < count:
            left, right = decompose(As, Bs, c, max(FLORA_RANKS))
            decomposing += time.perf_counter() - began
        for rank, tensors in outputs.items():
            tensors[f"{module}.lora_A.weight"] = right[:rank].bfloat16().contiguous()
            tensors[f"{module}.lora_B.weight"] = (left[:, :rank] / SCALING).bfloat16().contiguous()
    for rank, tensors in outputs.items():
        folder = out / f"rank-{rank}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config = folders[0] / "adapter_config.json"
        shutil.copy(config, folder / config.name)
    return time.perf_counter() - start + decomposing * (len(modules) / count - 1)


def _first_module(
    folders: Sequence[Path], weights: Sequence[float]
) -> tuple[str, list[Tensor], list[Tensor], list[float]]:
    clients = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    module = min(key[: -len(".lora_A.weight")] for key in clients[0] if ".lora_A." in key)
    As = [client[f"{module}.lora_A.weight"] for client in clients]
    Bs = [client[f"{module}.lora_B.weight"] for client in clients]
    return module, As, Bs, [SCALING * weight / sum(weights) for weight in weights]


def _delivered_excess(folders: Sequence[Path], weights: Sequence[float], written: Path) -> float:
    module, As, Bs, c = _first_module(folders, weights)
    delivered = load_file(written / "adapter_model.safetensors")
    left = SCALING * delivered[f"{module}.lora_B.weight"].double()
    return excess_error(As, Bs, c, left, delivered[f"{module}.lora_A.weight"].double())


def _decomposition_excess(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, float]:
    """Before anything is rounded to bfloat16: what the numerical promise is about."""
    _, As, Bs, c = _first_module(folders, weights)
    rank = max(FLORA_RANKS)
    A, B = fastagg.stack(As, Bs, weights=c)
    U, S, Vt, _ = fastagg.truncated_svd(A, B, rank)
    found = {"fastagg": excess_error(As, Bs, c, U.double() * S.double(), Vt)}
    for name, decompose in DECOMPOSITIONS.items():
        if name == "dense + linalg.svd":
            continue
        found[name] = excess_error(As, Bs, c, *decompose(As, Bs, c, rank))
    return found


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [
        f"llama7b-qv-10: FlexLoRA, folders to folders, {record['modules']} modules of "
        f"{record['size']} x {record['size']}, ten bf16 clients of ranks {record['ranks']}",
        f"{'':26s}{'seconds':>10s}{'slower':>10s}{'excess error delivered':>26s}",
    ]
    for row in record["rows"]:
        note = ""
        if row["measured_modules"] < record["modules"]:
            note = f"  (scaled from {row['measured_modules']} modules)"
        lines.append(
            f"{row['name']:26s}{row['seconds']:10.3f}{row['times_slower']:9.1f}x"
            f"{row['delivered_excess']:26.1e}{note}"
        )
    for name, value in record["decomposition_excess"].items():
        lines.append(f"excess error before rounding to bf16, {name}: {value:.1e}")
    return "\n".join(lines)


