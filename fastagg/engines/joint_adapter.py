"""The one adapter of a round, for engines that know a single global model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from fastagg.adapter import Adapter
from fastagg.aggregation import Aggregate
from fastagg.engines.first_adapters import layout_at_ranks, live, zeros
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout, Slot, TensorSpan

__all__ = ["JointAdapter"]


@dataclass(eq=False)
class JointAdapter:
    """What a round's clients have in all: their modules under their own keys, no numbers of theirs.

    config: of the joint adapter, which has its ranks and scalings. None: the largest rank that came in
        each module, and the clients' scaling where they agree on it, else 1.
    """

    config: AdapterConfig | None = None
    _slots: dict[str, Slot] = field(default_factory=dict)
    _whole: dict[str, TensorSpan] = field(default_factory=dict)
    _scalings: dict[str, set[float]] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _widest: tuple[int, str, Layout, AdapterConfig] | None = None

    def see(self, adapter: Adapter) -> None:
        """Takes note of a client's modules; of modules and whole tensors that several have, the widest
        rank and dtype are kept, with the first one's keys."""
        rank = max(slot.rank for slot in adapter.layout.slots)
        widest = (-rank, adapter.name or "", adapter.layout, adapter.config)
        if self._widest is None or widest[:2] < self._widest[:2]:
            self._widest = widest
        if adapter.layout.digest in self._seen:
            return
        self._seen.add(adapter.layout.digest)
        for slot in adapter.layout.slots:
            self._scalings.setdefault(slot.module, set()).add(slot.scaling)
            known = self._slots.get(slot.module, slot)
            if (slot.rank, slot.a.dtype, slot.b.dtype) == (known.rank, known.a.dtype, known.b.dtype):
                self._slots[slot.module] = known
                continue
            a = replace(known.a, dtype=torch.promote_types(known.a.dtype, slot.a.dtype))
            b = replace(known.b, dtype=torch.promote_types(known.b.dtype, slot.b.dtype))
            self._slots[slot.module] = replace(known, a=a, b=b, rank=max(known.rank, slot.rank))
        for span in adapter.layout.whole:
            seen = self._whole.get(span.key, span)
            self._whole[span.key] = replace(seen, dtype=torch.promote_types(seen.dtype, span.dtype))

    def of(self, aggregate: Aggregate, seed: int) -> Adapter:
        """What the round comes to. Each rank r of it is, in its first r rows and columns, what a client
        of that rank would be handed, but for the scaling.

        Ranks above that of dW, which are zero in both factors and could never be trained, get an A that
        is drawn from the seed; B A stays.

        Raises:
            InvalidInput: the configuration does not fit the clients' modules, or as
                :meth:`fastagg.Aggregate.adapter`.
        """
        config = self.config or self._widest_config()
        layout = layout_at_ranks(self._slots.values(), self._whole.values(), config)
        like = zeros(layout, config, name="the joint adapter")
        return live(aggregate.adapter(like=like), seed)

    def _widest_config(self) -> AdapterConfig:
        assert self._widest is not None
        _, _, layout, config = self._widest
        ranks = {module: slot.rank for module, slot in self._slots.items()}
        scalings = {
            module: next(iter(found)) if len(found) == 1 else 1.0
            for module, found in self._scalings.items()
        }
        return config.with_ranks(ranks, scalings, own_modules=layout.by_module)
