"""One round by one method: folders in, folders out, and what the clients have of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastagg.demo.clients import Client, deltas, loaded
from fastagg.demo.outcome import HandOut, MethodOutcome
from fastagg.demo.reference import Exact
from fastagg.errors import InvalidInput
from fastagg.federated.clients.llama import loss_on

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ADAPTER_FILE = "adapter_model.safetensors"


def run_round(
    method: str,
    clients: Sequence[Client],
    out: Path,
    *,
    base: LlamaForCausalLM,
    base_folder: Path,
    held_out: Tensor,
    exact: Exact,
    on_hand_out: Callable[[], None],
) -> MethodOutcome:
    """Aggregates the clients' folders into ``out`` and measures what each client would receive."""
    started = time.perf_counter()
    try:
        aggregate_folders(method, clients, out)
    except InvalidInput as refusal:
        return MethodOutcome(method, refused=str(refusal))
    seconds = time.perf_counter() - started

    total = sum(client.rank for client in clients)
    hand_outs = []
    for folder, receivers in folders_of_clients(clients, out):
        stacked = folder.name == "stacked"
        rank = total if stacked else receivers[0].rank
        with loaded(base, folder) as model:
            received = deltas(model)
            loss = float(loss_on(model, held_out).mean())
        if stacked:
            # What a client of FLoRA goes on with is its base model with the stack merged into it.
            loss = loss_of_merged(base_folder, folder, out / "merged", held_out)
        hand_outs.append(
            HandOut(
                rank=rank,
                clients=tuple(c.name for c in receivers),
                folder=str(folder),
                distance=exact.distance(received),
                optimum=exact.optimum(rank),
                loss=loss,
                nbytes=(folder / ADAPTER_FILE).stat().st_size,
                stacked=stacked,
            )
        )
        on_hand_out()
    return MethodOutcome(method, seconds, tuple(hand_outs))


def aggregate_folders(method: str, clients: Sequence[Client], out: Path) -> None:
    """``fastagg aggregate FOLDER.. --method METHOD --weights .. --out OUT``."""
    from fastagg import ClientUpdate, aggregate

    updates = [ClientUpdate.load(c.folder, weight=c.weight) for c in clients]
    aggregate(updates, method=method).save(out)


def folders_of_clients(clients: Sequence[Client], out: Path) -> list[tuple[Path, list[Client]]]:
    """The folders that ``clients.json`` names, each with its receivers, by falling rank."""
    named = json.loads((out / "clients.json").read_text())
    receivers: dict[Path, list[Client]] = {}
    for client in sorted(clients, key=lambda c: -c.rank):
        receivers.setdefault(out / named[client.name], []).append(client)
    return list(receivers.items())


def loss_of_merged(base: Path, adapter: Path, out: Path, held_out: Tensor) -> float:
    """``fastagg merge``, and the loss of the checkpoint that it wrote, as transformers loads it."""
    from transformers import LlamaForCausalLM

    from fastagg import Adapter
    from fastagg.checkpoint import merge_into_checkpoint

    merge_into_checkpoint(base, Adapter.load(adapter), out)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM.from_pretrained(str(out), dtype=torch.float32)
    return float(loss_on(model, held_out).mean())


def loss_with(base: LlamaForCausalLM, exact: Exact, held_out: Tensor) -> float:
    """The loss with the float64 dW added to the base weights by hand."""
    weights = {module: base.get_parameter(f"{module}.weight") for module in exact.delta}
    before = {module: weight.detach().clone() for module, weight in weights.items()}
    with torch.no_grad():
        for module, weight in weights.items():
            weight.copy_(weight.double() + exact.delta[module])
        value = float(loss_on(base, held_out).mean())
        for module, weight in weights.items():
            weight.copy_(before[module])
    return value
