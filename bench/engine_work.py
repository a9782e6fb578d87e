"""The work of a round, and the Aggregator itself doing it: what integrations are measured beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fastagg

__all__ = ["HandedOut", "Round", "StateDict", "Work", "check_same", "from_state_dicts", "from_updates"]

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Work:
    """Clients of mixed ranks: ``modules`` square modules each, and a global model of the middle rank."""

    modules: int
    size: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    def config(self, rank: int) -> dict[str, Any]:
        """The fields of an ``adapter_config.json``; alpha is the same for all ranks."""
        return {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]}

    @cached_property
    def states(self) -> list[StateDict]:
        """The clients' state dicts, as PEFT gives them."""
        return [self._state(rank, self.seed + place) for place, rank in enumerate(self.ranks)]

    @cached_property
    def model(self) -> StateDict:
        """The global model's state dict."""
        return self._state(self.middle, self.seed - 1)

    @cached_property
    def weights(self) -> list[float]:
        """Numbers of examples."""
        return [100.0 + 10 * place for place in range(len(self.ranks))]

    @cached_property
    def adapters(self) -> list[fastagg.Adapter]:
        """The clients' adapters, made."""
        pairs = zip(self.states, self.ranks, strict=True)
        return [fastagg.Adapter(state, self.config(rank)) for state, rank in pairs]

    @cached_property
    def shape_of_model(self) -> fastagg.Adapter:
        """The global model as the Aggregator takes it."""
        return fastagg.Adapter(self.model, self.config(self.middle))

    @property
    def middle(self) -> int:
        """The rank of the global model."""
        return sorted(self.ranks)[len(self.ranks) // 2]

    def _state(self, rank: int, seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        state = {}
        for layer in range(self.modules):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
            for side, shape in (("A", (rank, self.size)), ("B", (self.size, rank))):
                values = torch.randn(shape, generator=draw) / shape[1] ** 0.5
                state[f"{key}{side}.weight"] = values.to(self.dtype)
        return state


Round = Callable[[], list[StateDict]]
"""Runs one round; returns the global model's state dict, where there is one, and every client's."""


@dataclass(frozen=True)
class HandedOut:
    """What a round has to come to: the global model, every client's own adapter, or both."""

    model: bool
    clients: bool


def from_state_dicts(
    work: Work, handed_out: HandedOut, sent_as: torch.dtype | None = None
) -> Round:
    """The Aggregator itself, by whoever has state dicts, in the dtype that the codebase sends."""
    sent = work.states
    if sent_as is not None:
        sent = [{key: value.to(sent_as) for key, value in state.items()} for state in sent]

    def run() -> list[StateDict]:
        pairs = zip(sent, work.ranks, strict=True)
        own = None if sent_as is None else work.dtype
        adapters = (fastagg.Adapter(state, work.config(rank), dtype=own) for state, rank in pairs)
        return _aggregated(work, adapters, handed_out)

    return run


def from_updates(work: Work, handed_out: HandedOut) -> Round:
    """The Aggregator itself, by whoever has updates."""
    return lambda: _aggregated(work, work.adapters, handed_out)


def _aggregated(
    work: Work, adapters: Iterable[fastagg.Adapter], handed_out: HandedOut
) -> list[StateDict]:
    aggregator = fastagg.Aggregator("flexlora")
    for place, (adapter, weight) in enumerate(zip(adapters, work.weights, strict=True)):
        aggregator.add(fastagg.ClientUpdate(adapter, weight, str(place)))
    result = aggregator.finalize()
    handed = [result.adapter(like=work.shape_of_model)] if handed_out.model else []
    if handed_out.clients:
        handed += [result.adapter(client=client) for client in result.clients]
    return [adapter.state_dict() for adapter in handed]


def check_same(name: str, handed: list[StateDict], expected: list[StateDict]) -> None:
    """Whether an integration came to the Aggregator's own bits.

    Raises:
        RuntimeError: it did not.
    """
    for ours, theirs in zip(handed, expected, strict=True):
        if ours.keys() != theirs.keys() or not all(
            torch.equal(ours[key].to(tensor.dtype), tensor) for key, tensor in theirs.items()
        ):
            raise RuntimeError(f"{name} did not hand out what the Aggregator does")
