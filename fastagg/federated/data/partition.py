"""One list of examples shared out among clients, each example to exactly one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fastagg.errors import InvalidInput
from fastagg.federated.data.examples import ClientData, Example, file_name, split
from fastagg.federated.seeds import seed_of

Shares = dict[str, tuple[Example, ...]]

_DRAWS = 1000


def by_label(examples: Sequence[Example]) -> Shares:
    """A client for each label, sorted, of its name as a file name.

    Raises:
        InvalidInput: an example without a label, or two labels of one file name.
    """
    found: dict[str, list[Example]] = {}
    for label, places in _places(examples).items():
        name = file_name(label)
        if name in found:
            raise InvalidInput(
                "two labels would be one client's name", client=name, field="label", got=repr(label)
            )
        found[name] = [examples[place] for place in places]
    return {name: tuple(found[name]) for name in sorted(found)}


def iid(examples: Sequence[Example], clients: int, *, seed: int) -> Shares:
    """Examples at random; the numbers of any two clients differ by one at most.

    Raises:
        InvalidInput: fewer than one client, or fewer examples than clients.
    """
    _check_count(examples, clients, least=1)
    order = np.random.default_rng(seed_of(seed, "iid")).permutation(len(examples))
    return _shares(examples, np.array_split(order, clients))


def dirichlet(
    examples: Sequence[Example], clients: int, alpha: float, *, seed: int, least: int = 2
) -> Shares:
    """Each label's examples in proportions q ~ Dirichlet(alpha, .., alpha) over the clients.

    The smaller alpha, the fewer clients have most of a label; a large one nears IID. This is the
    partition of Yurochkin et al. (arXiv 1905.12022) and Li et al. (arXiv 2102.02079), who also draw
    again until every client has ``least`` examples. A label's n examples, in random order, are cut at
    floor(n (q_1 + .. + q_k)).

    Raises:
        InvalidInput: alpha not above 0, an example without a label, too few examples, or no draw of
            1,000 that gave each client ``least``.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise InvalidInput("not a concentration", field="alpha", expected="a number > 0", got=alpha)
    _check_count(examples, clients, least)
    places = [np.array(places) for _, places in sorted(_places(examples).items())]
    draw = np.random.default_rng(seed_of(seed, "dirichlet"))
    for _ in range(_DRAWS):
        proportions = draw.dirichlet(np.full(clients, alpha), size=len(places))
        cuts = [_cuts(share, len(own)) for share, own in zip(proportions, places, strict=True)]
        sizes = sum(np.diff(cut) for cut in cuts)
        if np.min(sizes) >= least:
            break
    else:
        raise InvalidInput(
            f"in {_DRAWS} draws some client always had fewer than {least} examples",
            field="alpha",
            got=alpha,
            cure=f"Raise alpha, or share fewer than {clients} clients' worth",
        )
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for cut, own in zip(cuts, places, strict=True):
        shuffled = draw.permutation(own)
        for client in range(clients):
            parts[client].append(shuffled[cut[client] : cut[client + 1]])
    return _shares(examples, [np.concatenate(part) for part in parts])


def as_clients(
    shares: Mapping[str, Sequence[Example]], held_out_share: float, *, seed: int
) -> tuple[ClientData, ...]:
    """Clients in the order of ``shares``, a share of each one's examples held out."""
    return tuple(split(name, own, held_out_share, seed=seed) for name, own in shares.items())


def _places(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Label -> where its examples are."""
    found: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        if example.label is None:
            raise InvalidInput(
                f"example {place} has no label to go by",
                field="columns.label",
                cure="Set columns.label to the field that holds it",
            )
        found.setdefault(example.label, []).append(place)
    return found


def _cuts(proportions: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """(clients + 1,): 0, the floors, and ``count``, whatever the proportions' sum was rounded to."""
    inner = np.floor(np.cumsum(proportions[:-1]) * count).clip(max=count)
    return np.concatenate(([0], inner, [count])).astype(np.int64)


def _shares(examples: Sequence[Example], parts: Sequence[NDArray[np.int64]]) -> Shares:
    """Clients named by number, all of equal length, so that names sort as numbers do."""
    digits = len(str(len(parts) - 1))
    return {
        f"client_{client:0{digits}}": tuple(examples[place] for place in sorted(part.tolist()))
        for client, part in enumerate(parts)
    }


def _check_count(examples: Sequence[Example], clients: int, least: int) -> None:
    if clients < 1:
        raise InvalidInput("no clients", field="clients", expected="at least 1", got=clients)
    if len(examples) < clients * least:
        raise InvalidInput(
            f"too few examples for {clients} clients",
            field="clients",
            expected=f"at least {clients * least} examples",
            got=len(examples),
            cure="Ask for fewer clients",
        )
