"""What is aggregated: the models, the clients and the ranks of the published experiments, by name.

FLoRA (2409.05976): ten clients of ranks 64 to 4, q_proj and v_proj of TinyLlama-1.1B and Llama-7B.
FlexLoRA (2402.11505): 5% of 1,613 clients a round, all seven projections of a 1.3B Llama, ranks 8 to
200; here 80 clients, most of them small (its "heavy-tail-light").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import cycle, islice

from fastagg.errors import InvalidInput

__all__ = ["CASES", "FLORA_RANKS", "SERIES", "Case", "Projection", "Series", "select"]

FLORA_RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)

# FlexLoRA's four types, attention and feed-forward, in the shares 85, 5, 5 and 5% of 80 clients.
_FLEXLORA_ATTENTION = (8,) * 68 + (30,) * 8 + (200,) * 4
_FLEXLORA_FEED_FORWARD = (8,) * 68 + (30,) * 4 + (200,) * 8


@dataclass(frozen=True)
class Projection:
    """A kind of linear module: its weight is m x n, in every layer once."""

    name: str
    m: int
    n: int
    ranks: tuple[int, ...]
    """r_k, client by client."""


@dataclass(frozen=True)
class Case:
    """What one server aggregates in one round."""

    name: str
    about: str
    layers: int
    projections: tuple[Projection, ...]

    @property
    def clients(self) -> int:
        """K."""
        return len(self.projections[0].ranks)

    @property
    def modules(self) -> int:
        """Linear modules in all layers."""
        return self.layers * len(self.projections)

    @property
    def rows(self) -> int:
        """R of the module that has most."""
        return max(sum(projection.ranks) for projection in self.projections)

    @property
    def rank(self) -> int:
        """The largest client's, of the module where that is largest."""
        return max(max(projection.ranks) for projection in self.projections)

    @property
    def elements_per_layer(self) -> int:
        """Entries of all clients' factors in one layer."""
        return sum(sum(p.ranks) * (p.m + p.n) for p in self.projections)


@dataclass(frozen=True)
class Series:
    """Cases that differ in one quantity: what grows, and how fast, is read off them."""

    name: str
    axis: str
    cases: tuple[Case, ...]
    values: tuple[int, ...]


def _flora(times: int = 1) -> tuple[int, ...]:
    return FLORA_RANKS * times


def _attention(hidden: int, key_value: int, ranks: tuple[int, ...]) -> tuple[Projection, ...]:
    shapes = {"q_proj": hidden, "k_proj": key_value, "v_proj": key_value, "o_proj": hidden}
    return tuple(Projection(f"self_attn.{name}", m, hidden, ranks) for name, m in shapes.items())


def _feed_forward(hidden: int, inner: int, ranks: tuple[int, ...]) -> tuple[Projection, ...]:
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return tuple(Projection(f"mlp.{name}", m, n, ranks) for name, (m, n) in shapes.items())


def _q_and_v(name: str, about: str, layers: int, hidden: int, key_value: int) -> Case:
    q, _, v, _ = _attention(hidden, key_value, _flora())
    return Case(name, about, layers, (q, v))


def _all_seven(
    name: str,
    about: str,
    layers: int,
    hidden: int,
    key_value: int,
    inner: int,
    attention: tuple[int, ...],
    feed_forward: tuple[int, ...],
) -> Case:
    projections = (
        *_attention(hidden, key_value, attention),
        *_feed_forward(hidden, inner, feed_forward),
    )
    return Case(name, about, layers, projections)


def _one_module(name: str, about: str, size: int, ranks: Sequence[int]) -> Case:
    return Case(name, about, 1, (Projection("self_attn.q_proj", size, size, tuple(ranks)),))


_MODELS = (
    _q_and_v("tinyllama-qv-10", "FLoRA's clients, TinyLlama-1.1B, q and v", 22, 2048, 256),
    _q_and_v("llama7b-qv-10", "FLoRA's clients, Llama-7B, q and v", 32, 4096, 4096),
    _all_seven(
        "flexlora-1.3b-80",
        "FlexLoRA's clients of ranks 8 to 200, a 1.3B Llama, seven projections",
        24, 2048, 2048, 5504, _FLEXLORA_ATTENTION, _FLEXLORA_FEED_FORWARD,
    ),
    _all_seven(
        "llama7b-all-10", "FLoRA's clients, Llama-7B, seven projections",
        32, 4096, 4096, 11008, _flora(), _flora(),
    ),
    _all_seven(
        "llama7b-all-100", "ten times FLoRA's clients, Llama-7B, seven projections",
        32, 4096, 4096, 11008, _flora(10), _flora(10),
    ),
    _all_seven(
        "llama70b-layer-10", "FLoRA's clients, one layer of Llama-2-70B, seven projections",
        1, 8192, 1024, 28672, _flora(), _flora(),
    ),
)  # fmt: skip

def _series(name: str, axis: str, about: str, modules: dict[int, tuple[int, Sequence[int]]]) -> Series:
    """modules: value -> the size of a square module and its clients' ranks."""
    cases = tuple(
        _one_module(f"{name}-{value}", about.format(value), size, ranks)
        for value, (size, ranks) in modules.items()
    )
    return Series(name, axis, cases, tuple(modules))


SERIES: dict[str, Series] = {
    series.name: series
    for series in (
        _series(
            "square", "m = n", "one module of {0} x {0}, FLoRA's clients",
            {size: (size, _flora()) for size in (256, 512, 1024, 2048, 4096, 8192)},
        ),
        _series(
            "ranks", "R", "one module of 2048 x 2048, ten clients, R = {0}",
            {rows: (2048, (rows // 10,) * 10) for rows in (40, 80, 160, 320, 640, 1280)},
        ),
        _series(
            "clients", "clients", "one module of 2048 x 2048, {0} clients of ranks 4, 8 and 16",
            {
                count: (2048, tuple(islice(cycle((4, 8, 16)), count)))
                for count in (10, 30, 100, 300, 1000)
            },
        ),
    )
}  # fmt: skip

CASES: dict[str, Case] = {
    case.name: case
    for case in (*_MODELS, *(case for series in SERIES.values() for case in series.cases))
}


def select(patterns: Iterable[str]) -> list[Case]:
    """The cases of these names or patterns (`square-*`), each once, in the order of the patterns.

    Raises:
        InvalidInput: a pattern that fits no case.
    """
    found: dict[str, Case] = {}
    for pattern in patterns:
        fitting = {name: case for name, case in CASES.items() if fnmatchcase(name, pattern)}
        if not fitting:
            raise InvalidInput(
                "there is no such case",
                field="--case",
                expected=f"one of {', '.join(CASES)}, or a pattern such as 'square-*'",
                got=repr(pattern),
            )
        found |= fitting
    return list(found.values())
