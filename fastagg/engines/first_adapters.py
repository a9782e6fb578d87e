"""Adapters that nobody has trained: fresh ones, zeros, and ranks that could not be trained otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from fastagg.adapter import Adapter
from fastagg.federated.clients.fresh_factors import normal, ranks_of, uniform
from fastagg.federated.seeds import seed_of
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout, Slot, TensorSpan, packed

__all__ = ["at_ranks", "layout_at_ranks", "live", "zeros"]


def at_ranks(initial: Adapter, config: AdapterConfig, seed: int) -> Adapter:
    """The modules of an adapter at the ranks of a configuration, its factors as PEFT begins: A is drawn,
    B is zero (of an embedding B is drawn and A is zero). Whole tensors keep their numbers.

    Each module has a generator of its own and its ranks are drawn one by one, so the adapters of two
    ranks have the rows of the smaller in common.

    Raises:
        InvalidInput: the configuration does not fit the adapter's modules.
    """
    state = initial.state_dict()
    for slot in initial.layout.slots:
        rank = config.rank_of(slot.module)
        drawn = _drawn(slot, rank, seed)
        a_shape, b_shape = slot.factor_shapes(rank)
        if slot.kind == "embedding":
            a, b = torch.zeros(a_shape), drawn.t().reshape(b_shape)
        else:
            a, b = drawn.reshape(a_shape), torch.zeros(b_shape)
        state[slot.a.source], state[slot.b.source] = a.to(slot.a.dtype), b.to(slot.b.dtype)
    return Adapter(state, config, name=initial.name)


def zeros(layout: Layout, config: AdapterConfig, *, name: str | None = None) -> Adapter:
    """An adapter of which all numbers are zero."""
    return Adapter.from_flat(torch.zeros(layout.nbytes, dtype=torch.uint8), layout, config, name=name)


def layout_at_ranks(
    slots: Iterable[Slot], whole: Iterable[TensorSpan], config: AdapterConfig
) -> Layout:
    """The layout of these modules and whole tensors, under their own keys, at a configuration's ranks.

    Raises:
        InvalidInput: the configuration does not fit them.
    """
    spans = list(whole)
    for slot in slots:
        a_shape, b_shape = slot.factor_shapes(config.rank_of(slot.module))
        spans += [replace(slot.a, shape=a_shape), replace(slot.b, shape=b_shape)]
    placed, nbytes = packed(replace(span, key=span.source) for span in spans)
    return Layout.of(list(placed.values()), config, nbytes)


def live(adapter: Adapter, seed: int) -> Adapter:
    """The adapter with those ranks drawn anew whose factors are zero in both A and B; B A stays.

    A client whose rank is above that of dW would get such ranks, and could never train them: the
    gradient of each factor is the other times something.
    """
    state = adapter.state_dict()
    changed = False
    for slot in adapter.layout.slots:
        a, b = adapter.factors(slot.module)
        # The ranks that dW did not fill are the last ones.
        if bool(a[-1].any()) or bool(b[:, -1].any()):
            continue
        dead = (a == 0).all(1) & (b == 0).all(0)
        changed = True
        drawn = _drawn(slot, slot.rank, seed)
        if slot.kind == "embedding":
            fresh = b.clone()
            fresh[:, dead] = drawn.t()[:, dead].to(b.dtype)
            state[slot.b.source] = fresh.reshape(slot.b.shape)
        else:
            fresh = a.clone()
            fresh[dead] = drawn[dead].to(a.dtype)
            state[slot.a.source] = fresh.reshape(slot.a.shape)
    return Adapter(state, adapter.config, name=adapter.name) if changed else adapter


def _drawn(slot: Slot, rank: int, seed: int) -> torch.Tensor:
    """(rank, n) of A, or (rank, m) of an embedding's B, float32."""
    generator = torch.Generator().manual_seed(seed_of(seed, "first factors", slot.module))
    if slot.kind == "embedding":
        return ranks_of(rank, slot.m, normal, generator)
    return ranks_of(rank, slot.n, uniform, generator)
