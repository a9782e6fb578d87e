"""The federated loop: a server and its clients, which speak in updates and hand-outs.

    server = Server("flexlora", {"ann": fresh_adapter, "bob": another})
    server.start_round(["ann", "bob"])
    server.receive(client.fit(server.handout("ann")))     # any transport may stand between
    outcome = server.finish_round()

Names are loaded when they are first used: the parts below are imported without each other.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastagg.federated.clients.client import Client as Client
    from fastagg.federated.clients.local_model import LocalModel as LocalModel
    from fastagg.federated.clients.training import LocalTraining as LocalTraining
    from fastagg.federated.messages import ClientFailure as ClientFailure
    from fastagg.federated.messages import Handout as Handout
    from fastagg.federated.server.server import RoundOutcome as RoundOutcome
    from fastagg.federated.server.server import Server as Server
    from fastagg.federated.server.server import TooFewUpdates as TooFewUpdates
    from fastagg.federated.server.server_optimisers import FedAdam as FedAdam
    from fastagg.federated.server.server_optimisers import FedAvg as FedAvg
    from fastagg.federated.server.server_optimisers import FedAvgM as FedAvgM
    from fastagg.federated.server.server_optimisers import FedYogi as FedYogi

_HOMES = {
    "Client": "clients.client",
    "ClientFailure": "messages",
    "FedAdam": "server.server_optimisers",
    "FedAvg": "server.server_optimisers",
    "FedAvgM": "server.server_optimisers",
    "FedYogi": "server.server_optimisers",
    "Handout": "messages",
    "LocalModel": "clients.local_model",
    "LocalTraining": "clients.training",
    "RoundOutcome": "server.server",
    "Server": "server.server",
    "TooFewUpdates": "server.server",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastagg.federated' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastagg.federated.{_HOMES[name]}"), name)
