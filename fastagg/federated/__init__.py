"""The federated loop: a server and its clients, which speak in updates and hand-outs."""
