"""A client's side of a round: the model in memory, its adapter, and local training."""
