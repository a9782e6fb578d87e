"""What each site runs: it trains an adapter of its own rank on data of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

import nvflare.client as flare
import torch
from model import LENGTH, VOCABULARY, peft_model

from fastagg import Adapter
from fastagg.engines.nvflare import AdapterClient


def sequences(site: int, count: int = 16) -> torch.Tensor:
    """Every site counts in steps of its own: there is something to learn, and another thing at each."""
    draw = torch.Generator().manual_seed(site)
    first = torch.randint(VOCABULARY, (count, 1), generator=draw)
    return (first + (2 * site + 1) * torch.arange(LENGTH)) % VOCABULARY


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> float:
    optimiser = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=1e-2, weight_decay=0
    )
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default="2,4,8,16", help="of site-1, site-2 and so on")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, help="folder for what is sent and received")
    arguments = parser.parse_args()

    flare.init()
    name = flare.get_site_name()
    site = int(name.rpartition("-")[2])
    rank = int(arguments.ranks.split(",")[site - 1])
    model = peft_model(rank, getattr(torch, arguments.dtype))
    tokens = sequences(site, count=8 * site)

    client = AdapterClient(model)
    for number in client.rounds():
        if arguments.record:
            record(model, client, arguments.record / f"round-{number}" / name, "received")
        loss = train(model, tokens, arguments.steps)
        print(f"{name}, round {number}, rank {rank}: loss {loss:.3f}")
        if arguments.record:
            record(model, client, arguments.record / f"round-{number}" / name, "sent")
        client.send(len(tokens), {"loss": loss})


def record(model, client: AdapterClient, folder: Path, what: str) -> None:
    """Writes the adapter that is in the model, and, of what was received, the tensors as they came."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    Adapter(state, config).save(folder / what)
    if what == "received" and client.received.params:
        torch.save(dict(client.received.params), folder / "params.pt")


if __name__ == "__main__":
    main()
