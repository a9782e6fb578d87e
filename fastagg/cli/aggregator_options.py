"""Options of an Aggregator, for the commands that make one."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from fastagg.cli.options import check_ranks


class Accumulator(str, Enum):
    """What the round adds up in."""

    auto = "auto"
    stack = "stack"
    dense = "dense"


class Route(str, Enum):
    """How dW is decomposed."""

    auto = "auto"
    gram = "gram"
    qr = "qr"
    randomized = "randomized"
    dense = "dense"


class Device(str, Enum):
    """Where the work is done."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """Of what is handed out."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Ranks = Annotated[
    str | None,
    typer.Option(
        callback=check_ranks,
        metavar="4,8",
        help="Hand out adapters of these ranks instead of the clients' own; each client gets "
        "the largest that is not above its own, else the smallest.",
        show_default=False,
    ),
]
OnDevice = Annotated[Device, typer.Option(help="Where to compute.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="8GiB",
        help="What the accumulator and the work may take together; refused before any work, "
        "with the figure needed, where that is not enough. Default: any.",
        show_default=False,
    ),
]
Adding = Annotated[
    Accumulator,
    typer.Option(
        help="stack keeps the factors and grows with the clients, dense keeps dW; auto takes "
        "the smaller."
    ),
]
By = Annotated[Route, typer.Option(help="The decomposition; auto takes the fastest by its cost model.")]
HandedOutAs = Annotated[
    Dtype | None,
    typer.Option(help="Of what is handed out. Default: each client's own.", show_default=False),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the randomized decomposition.")]


def options_of(
    device: Device,
    max_memory: str | None,
    accumulator: Accumulator,
    route: Route,
    dtype: Dtype | None,
    seed: int,
) -> dict[str, Any]:
    """As :class:`fastagg.Aggregator` takes them."""
    return {
        "device": device.value,
        "max_memory": max_memory,
        "accumulator": accumulator.value,
        "route": route.value,
        "dtype": None if dtype is None else dtype.value,
        "seed": seed,
    }
