"""The federated loop: a server and its clients, which speak in updates and hand-outs.

    server = Server("flexlora", {"ann": fresh_adapter, "bob": another})
    server.start_round(["ann", "bob"])
    server.receive(client.fit(server.handout("ann")))     # any transport may stand between
    outcome = server.finish_round()
"""

from fastagg.federated.clients.client import Client
from fastagg.federated.clients.local_model import LocalModel
from fastagg.federated.clients.training import LocalTraining
from fastagg.federated.messages import ClientFailure, Handout
from fastagg.federated.server.server import RoundOutcome, Server, TooFewUpdates
from fastagg.federated.server.server_optimisers import FedAdam, FedAvg, FedAvgM, FedYogi

__all__ = [
    "Client",
    "ClientFailure",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedYogi",
    "Handout",
    "LocalModel",
    "LocalTraining",
    "RoundOutcome",
    "Server",
    "TooFewUpdates",
]
