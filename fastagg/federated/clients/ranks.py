"""Who gets which rank: each scheme gives every client, by name, its :class:`ClientRanks`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Literal

import numpy as np
import torch

from fastagg.byte_sizes import format_bytes
from fastagg.errors import InvalidInput
from fastagg.federated.seeds import seed_of

Distribution = Literal["uniform", "normal", "heavy-tail-light", "heavy-tail-strong"]


@dataclass(frozen=True)
class ClientRanks:
    """The ranks of one client's modules.

    rank: of every module that no pattern names.
    pattern: PEFT's ``rank_pattern``: regular expression over the end of a module's name -> rank.

    Raises:
        InvalidInput: a rank below 1.
    """

    rank: int
    pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, rank in {"rank": self.rank, **self.pattern}.items():
            if rank < 1:
                raise InvalidInput("not a rank", field=place, expected="at least 1", got=rank)

    def lora_fields(self, alpha_over_rank: float = 2.0) -> dict[str, Any]:
        """``r``, ``lora_alpha`` and their patterns for ``peft.LoraConfig``: alpha = 2 r everywhere."""
        alphas = {module: _alpha(rank, alpha_over_rank) for module, rank in self.pattern.items()}
        return {
            "r": self.rank,
            "lora_alpha": _alpha(self.rank, alpha_over_rank),
            "rank_pattern": dict(self.pattern),
            "alpha_pattern": alphas,
        }


# The ten clients of FLoRA's experiments (arXiv 2409.05976).
FLORA_RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)

# What lies in a decoder's feed-forward block, in the names of Llama, GPT-2, Mixtral, OPT and their kin.
FEED_FORWARD = r"(?:mlp|feed_forward|ffn|block_sparse_moe)\..+|fc[12]"

# FlexLoRA's rank types (arXiv 2402.11505), from the fewest resources to the most.
FLEXLORA_TYPES = (
    ClientRanks(8),
    ClientRanks(30),
    ClientRanks(30, {FEED_FORWARD: 200}),
    ClientRanks(200),
)


def _normal(types: int, deviation: float) -> tuple[float, ...]:
    """A normal density about the middle of 0, 1, .., types - 1, normalised."""
    density = [math.exp(-0.5 * ((i - (types - 1) / 2) / deviation) ** 2) for i in range(types)]
    return tuple(value / sum(density) for value in density)


# The share of clients that has each type. A tail: 85% of the clients have the smallest (the largest)
# type and the others are shared evenly, as FlexLoRA's README says; its code draws 80, 10, 5 and 5%.
# The normal distribution's deviation of 0.7 types is the code's.
SHARES: dict[Distribution, tuple[float, ...]] = {
    "uniform": (0.25, 0.25, 0.25, 0.25),
    "normal": _normal(4, 0.7),
    "heavy-tail-light": (0.85, 0.05, 0.05, 0.05),
    "heavy-tail-strong": (0.05, 0.05, 0.05, 0.85),
}

# An adapter's weights, their gradient, and AdamW's two moments, all of the adapter's dtype.
_COPIES = 4


def each(ranks: Sequence[int], clients: Sequence[str]) -> dict[str, ClientRanks]:
    """A rank for each client, in their order; a single one is for all.

    Raises:
        InvalidInput: another number of ranks: repeating or cutting a list that was written for some
            clients would be a guess.
    """
    if len(ranks) not in (1, len(clients)):
        raise InvalidInput(
            "not a rank for each client",
            field="ranks",
            expected=f"{len(clients)} ranks, or one for all",
            got=len(ranks),
        )
    return {client: ClientRanks(rank) for client, rank in zip(clients, cycle(ranks), strict=False)}


def flora(clients: Sequence[str]) -> dict[str, ClientRanks]:
    """FLoRA's list, in the order of the clients.

    It stands for a mix of clients rather than for ten certain ones, so more than ten begin it anew,
    and fewer take its beginning.
    """
    return {client: ClientRanks(rank) for client, rank in zip(clients, cycle(FLORA_RANKS), strict=False)}


def distributed(
    distribution: Distribution,
    clients: Sequence[str],
    *,
    seed: int,
    types: Sequence[ClientRanks] = FLEXLORA_TYPES,
) -> dict[str, ClientRanks]:
    """Four types in one of FlexLoRA's distributions of resources.

    As many clients have each type as the distribution says, to a whole client (largest remainders,
    the smaller type first), rather than about as many by chance; who has which is drawn.

    Raises:
        InvalidInput: an unknown distribution, or not four types.
    """
    if distribution not in SHARES or len(types) != 4:
        raise InvalidInput(
            "not a distribution over four types",
            field="distribution" if distribution not in SHARES else "types",
            expected=", ".join(SHARES) if distribution not in SHARES else 4,
            got=repr(distribution) if distribution not in SHARES else len(types),
        )
    kinds = np.repeat(np.arange(4), _counts(SHARES[distribution], len(clients)))
    draw = np.random.default_rng(seed_of(seed, "rank types"))
    return {
        client: types[kind]
        for client, kind in zip(clients, draw.permutation(kinds).tolist(), strict=True)
    }


def adapter_bytes(
    rank: int, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype = torch.float32
) -> int:
    """Memory that training an adapter takes beside the model and its activations.

    4 r sum (m + n) numbers of the adapter's dtype over all modules of shape (m, n): the weights of A
    (r, n) and B (m, r), their gradient, and the two moments of AdamW.
    """
    return _COPIES * rank * sum(m + n for m, n in shapes.values()) * dtype.itemsize


def by_memory(
    budgets: Sequence[int],
    clients: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    dtype: torch.dtype = torch.float32,
) -> dict[str, ClientRanks]:
    """For each client the largest rank whose :func:`adapter_bytes` its budget of bytes holds.

    Args:
        budgets: one for each client, in their order, or a single one for all.
        shapes: target module -> (m, n) of its weight.

    No rank is above the largest min(m, n) of all modules: there dW is of full rank already.

    Raises:
        InvalidInput: another number of budgets, no modules, or a budget that holds no rank at all.
    """
    if len(budgets) not in (1, len(clients)) or not shapes:
        raise InvalidInput(
            "not a budget for each client" if shapes else "no module to fit an adapter to",
            field="budgets" if shapes else "shapes",
            expected=f"{len(clients)} budgets, or one for all" if shapes else "at least one",
            got=len(budgets) if shapes else 0,
        )
    one = adapter_bytes(1, shapes, dtype)
    full = max(min(shape) for shape in shapes.values())
    found = {}
    for client, budget in zip(clients, cycle(budgets), strict=False):
        if budget < one:
            raise InvalidInput(
                "not even an adapter of rank 1 fits",
                client=client,
                field="budgets",
                expected=f"at least {one} bytes ({format_bytes(one)})",
                got=f"{budget} bytes",
                cure="Raise the budget, or target fewer modules",
            )
        found[client] = ClientRanks(min(budget // one, full))
    return found


def _counts(shares: Sequence[float], clients: int) -> list[int]:
    """Whole clients of each type, summing to ``clients``."""
    exact = [round(share * clients, 9) for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (round(counts[i] - exact[i], 9), i))
    for kind in by_remainder[: clients - sum(counts)]:
        counts[kind] += 1
    return counts


def _alpha(rank: int, alpha_over_rank: float) -> int | float:
    alpha = rank * alpha_over_rank
    return int(alpha) if float(alpha).is_integer() else alpha
