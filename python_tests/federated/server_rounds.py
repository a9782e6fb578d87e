"""Rounds of a server and of random clients, and what is handed out, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from adapters import same_bits
from equations import SAVED, SHAPES, Client, client, exact, norm_shares, padded_means, shares

from fastagg import Adapter, ClientUpdate
from fastagg.federated.server.server import RoundOutcome, Server

# Fewer and smaller than SHAPES: a server's rounds are many.
MODULES = dict(list(SHAPES.items())[1:3])
RANKS = {"a": 4, "b": 8, "c": 2, "d": 16, "e": 4}


def fresh(ranks: Mapping[str, int] = RANKS, **options: object) -> dict[str, Adapter]:
    """What clients are registered with: B = 0."""
    return {
        name: client(name, rank, seed=0, zero_b=True, **{"modules": MODULES, **options}).adapter  # type: ignore[arg-type]
        for name, rank in ranks.items()
    }


def trained(
    seed: int, ranks: Mapping[str, int] = RANKS, names: Iterable[str] | None = None, **options: object
) -> list[Client]:
    """What clients of these ranks send: anything."""
    return [
        client(
            name,
            ranks[name],
            seed=seed + number,
            weight=10.0 + 7 * number,
            **{"modules": MODULES, **options},  # type: ignore[arg-type]
        )
        for number, name in enumerate(ranks if names is None else names)
    ]


def play(server: Server, clients: Sequence[Client | ClientUpdate]) -> RoundOutcome:
    """A round in which all that take part send what they have."""
    updates = [each.update if isinstance(each, Client) else each for each in clients]
    server.start_round([update.client_id for update in updates])
    for update in updates:
        assert server.receive(update) is None
    return server.finish_round()


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    """s B A (m, n) in float64."""
    a, b = adapter.factors(module)
    return adapter.scaling(module) * b.double() @ a.double()


def target(method: str, clients: Sequence[Client], module: str) -> torch.Tensor:
    """The method's dW (m, n) in float64."""
    if method in ("flora", "flexlora"):
        return exact(clients, module)
    weights = norm_shares if method == "hetlora" else lambda c, m: shares(c, m, "renormalise")
    a, b = padded_means(clients, module, weights(clients, module))
    return b @ a


def handed(server: Server) -> dict[str, Adapter]:
    """What each client is handed."""
    found = {}
    for name in server.clients:
        adapter = server.handout(name).adapter
        assert adapter is not None
        found[name] = adapter
    return found


def assert_same_hand_outs(one: Server, two: Server) -> None:
    """Whether two servers hand out the same bits."""
    assert one.clients == two.clients
    for name in one.clients:
        left, right = one.handout(name), two.handout(name)
        assert (left.round, left.merge) == (right.round, right.merge)
        assert (left.adapter is None) == (right.adapter is None)
        if left.adapter is not None and right.adapter is not None:
            assert same_bits(left.adapter.state_dict(), right.adapter.state_dict())
            assert left.adapter.config == right.adapter.config


def whole_mean(clients: Sequence[Client]) -> torch.Tensor:
    """The average of the whole tensor of those that have it, in float64."""
    having = [each for each in clients if SAVED in each.adapter.state_dict()]
    total = sum(each.weight for each in having)
    return torch.stack(
        [each.weight / total * each.adapter.state_dict()[SAVED].double() for each in having]
    ).sum(0)
