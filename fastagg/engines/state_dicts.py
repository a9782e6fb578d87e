"""Rounds whose clients send state dicts: what is common to the hooks that hand over a list of them.

The codebases differ in how they call their hook. What they pass are PEFT's tensors, under keys with or
without a prefix and the adapter's name, and one configuration that all clients share but for the rank.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagg.adapter import Adapter
from fastagg.aggregation import Aggregate
from fastagg.aggregator import Aggregator
from fastagg.engines.first_adapters import layout_at_ranks, zeros
from fastagg.engines.tensor_ranks import at_ranks_of
from fastagg.errors import InvalidInput
from fastagg.method import Method
from fastagg.peft_format.adapter_folder import named_path, read_config
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout
from fastagg.report import SkippedClient
from fastagg.update import ClientUpdate

__all__ = ["StateDictRounds", "adapter_part"]

StateDict = dict[str, Tensor]
Entry = tuple[str, float, Any]


@dataclass(frozen=True)
class _Client:
    """What a client's adapter looks like, and where its tensors were."""

    layout: Layout
    config: AdapterConfig
    device: torch.device

    @classmethod
    def of(cls, adapter: Adapter, state: Mapping[str, Tensor]) -> _Client:
        return cls(adapter.layout, adapter.config, next(iter(state.values())).device)

    def resized(self, config: AdapterConfig) -> _Client:
        """A client that has the same modules and keys at the ranks of its own configuration."""
        layout = layout_at_ranks(self.layout.slots, self.layout.whole, config)
        return _Client(layout, config, self.device)


@dataclass(frozen=True)
class _Ended:
    """A round that has been aggregated: ``keys`` are the tensors that its members have."""

    result: Aggregate
    keys: frozenset[str]
    known: dict[str, _Client]
    skipped: list[SkippedClient]


class StateDictRounds:
    """Round after round of clients' state dicts, of any ranks, aggregated by one method.

    Args:
        config: the clients' LoRA configuration: a ``peft.LoraConfig``, the fields of an
            ``adapter_config.json``, or an adapter's folder. Ranks are read off the tensors, so that a
            client's scaling is ``lora_alpha`` over its *own* rank (or its root, under rsLoRA).
        method: as :class:`fastagg.Aggregator` takes it, of those that hand every client an adapter of
            its own rank.
        clients: client -> its own configuration, where that is another than ``config``: another
            ``lora_alpha``, say. Its ranks then have to be the tensors', and are known before the client
            is heard.
        skip_invalid: leave a client out that cannot be aggregated, with a warning, instead of failing
            the round.
        options: those of :class:`fastagg.Aggregator`: max_memory, missing, accumulator, route, device,
            dtype, seed.

    Attributes:
        result: the last round's aggregate; None before the first. It holds what the round's
            accumulator held until the next round has ended.
        skipped: the clients that the last round left out, and why.

    A round that fails leaves both as they were.

    Raises:
        InvalidInput: a configuration or an option that cannot be used.
    """

    result: Aggregate | None
    skipped: list[SkippedClient]

    def __init__(
        self,
        config: object,
        method: str | Method = "flexlora",
        *,
        clients: Mapping[Any, object] | None = None,
        skip_invalid: bool = False,
        **options: Any,
    ) -> None:
        _check_hands_out_ranks(Aggregator(method, **options).method)
        self.skip_invalid = skip_invalid
        self.result = None
        self.skipped = []
        self._method = method
        self._options = options
        self._config = _parsed(config, None)
        self._own_configs = {str(name): _parsed(own, str(name)) for name, own in (clients or {}).items()}
        self._known: dict[str, _Client] = {}
        self._model: _Client | None = None
        self._keys: frozenset[str] = frozenset()

    def handout(self, client: object, like: Mapping[str, Tensor] | None = None) -> StateDict:
        """What a client goes on from: the method's hand-out at the client's own rank.

        Args:
            client: as the codebase numbers or names it: one that was heard in any round, or that has a
                configuration of its own, whose ranks the global model's modules then have.
            like: a state dict of the client's, for any other, and for one that has modules which the
                last round's clients lack; such keep their numbers.

        Returns:
            The client's own keys, ranks and dtypes, on the device that its tensors were on. The tensors
            are the caller's, and share one storage.

        Raises:
            InvalidInput: no round has ended yet, or ``like`` is needed.
            MemoryBudgetExceeded: the adapter does not fit into max_memory.
        """
        name = str(client)
        if self.result is None:
            raise InvalidInput(
                "there is nothing to hand out before the first round", client=name, field="handout"
            )
        if like is not None:
            own = self._adapter(name, like)
            self._known[name] = _Client.of(own, like)
            return self._up_to_date(self.result, own, like)
        known = self._known_client(name)
        lacking = [span for span in known.layout.tensors if span.key not in self._keys]
        if lacking:
            raise InvalidInput(
                "no client of the last round has this tensor, whose numbers are the client's own",
                client=name,
                field=lacking[0].source,
                cure="Pass like=, the client's state dict",
            )
        if name in self.result.clients:
            handed = self.result.adapter(client=name)
        else:
            # All of it is overwritten: what the layout has, the round has too.
            blank = zeros(known.layout, known.config, name=name)
            handed = self.result.adapter(like=blank)
        return {key: tensor.to(known.device) for key, tensor in handed.state_dict().items()}

    def _round(
        self, entries: Iterable[Entry], model: Mapping[str, Tensor], field: str
    ) -> StateDict:
        """Aggregates a round and brings the server's own model up to date.

        Args:
            entries: (client, weight, what it sent) of each, which are folded in as they come.
            model: the state dict of the model that the codebase hands to all clients.
            field: what the codebase calls the list.

        Returns:
            The keys of ``model``: its adapter at its own rank, and whatever else it holds as it came.
        """
        ended = self._fold(entries, field)
        own = self._adapter("the global model", model)
        handed = self._up_to_date(ended.result, own, model)
        self._settle(ended)
        self._model = _Client.of(own, model)
        return handed

    def _fold(self, entries: Iterable[Entry], field: str) -> _Ended:
        """Aggregates a round; ``self`` is as it was until :meth:`_settle`."""
        aggregator = Aggregator(self._method, **self._options)
        known: dict[str, _Client] = {}
        skipped: list[SkippedClient] = []
        for client, weight, sent in entries:
            try:
                state = self._tensors(client, sent)
                adapter = self._adapter(client, state)
                known[client] = _Client.of(adapter, state)
                aggregator.add(ClientUpdate(adapter, weight, client))
            except InvalidInput as error:
                named = error.for_client(client)
                if not self.skip_invalid:
                    raise named from error
                warnings.warn(f"left out of the round: {named}", stacklevel=4)
                skipped.append(SkippedClient(client, "", str(named)))
        if not aggregator.clients:
            raise InvalidInput(
                "there is nothing to aggregate",
                field=field,
                expected="the update of at least one client",
                got=f"{len(skipped)} that are not valid, the first: {skipped[0].reason}"
                if skipped
                else "none",
            )
        members = [known[client] for client in aggregator.clients]
        keys = frozenset(span.key for member in members for span in member.layout.tensors)
        result = aggregator.finalize()
        result.skipped = skipped
        return _Ended(result, keys, known, skipped)

    def _settle(self, ended: _Ended) -> None:
        self._known.update(ended.known)
        self._keys = ended.keys
        self.result, self.skipped = ended.result, ended.skipped

    def _up_to_date(self, result: Aggregate, own: Adapter, state: Mapping[str, Tensor]) -> StateDict:
        new = result.adapter(like=own).state_dict()
        return {key: new[key].to(old.device) if key in new else old for key, old in state.items()}

    def _known_client(self, name: str) -> _Client:
        known, config = self._known.get(name), self._own_configs.get(name)
        if known is None and config is not None and self._model is not None:
            return self._model.resized(config)
        if known is None:
            raise InvalidInput(
                "no update of this client has come yet, so its rank is not known",
                client=name,
                expected=f"one of {len(self._known)}: {', '.join(list(self._known)[:5])}",
                cure="Pass like=, a state dict of the client's, or its configuration in clients=",
            )
        return known

    def _tensors(self, client: str, sent: Any) -> Mapping[str, Tensor]:
        """A client's message as tensors by key.

        Raises:
            InvalidInput: it is none; the client is left out under ``skip_invalid``.
        """
        if not isinstance(sent, Mapping):
            raise InvalidInput(
                "not a state dict",
                client=client,
                expected="a mapping from keys to tensors",
                got=type(sent).__name__,
            )
        return sent

    def _adapter(self, client: str, state: Mapping[str, Tensor]) -> Adapter:
        config = self._own_configs.get(client)
        part = adapter_part(state, config or self._config)
        if config is None:
            config = at_ranks_of(self._config, part)
        return Adapter(part, config, name=client, dtype=self._dtype_of(part))

    def _dtype_of(self, part: Mapping[str, Tensor]) -> torch.dtype | None:
        """What a client's tensors are aggregated in; None: their own dtypes."""
        return None


def adapter_part(state: Mapping[str, Tensor], config: AdapterConfig) -> Mapping[str, Tensor]:
    """What PEFT trains of a state dict: all of it, or where it is a whole model's, the adapter.

    A whole model's has the frozen weights beside the factors (``q_proj.base_layer.weight``). Of such a
    dict only LoRA factors, ``modules_to_save`` and, where the configuration trains them, biases count.
    """
    factored = {key.split(".lora_A.")[0] for key in state if isinstance(key, str) and ".lora_A." in key}
    # PEFT saves an output layer's base weight beside a targeted embedding: one is no whole model yet.
    frozen = sum(f"{module}.base_layer.weight" in state for module in factored)
    if frozen < 2 and not any(".original_module." in key for key in state if isinstance(key, str)):
        return state
    biases = {"all": ".bias", "lora_only": ".base_layer.bias"}.get(config.raw.get("bias") or "none")
    return {
        key: tensor
        for key, tensor in state.items()
        if ".lora_" in key
        or ".modules_to_save." in key
        or (biases is not None and key.endswith(biases) and ".original_module." not in key)
    }


def _check_hands_out_ranks(method: Method) -> None:
    if not method.handout.ranked:
        raise InvalidInput(
            f"{method.name} hands out one stack, which clients merge into their base weights; this "
            "codebase's clients load what they get into the adapter that they have",
            field="method",
            expected="a method that hands each client an adapter of its own rank",
            got=repr(method.name),
            cure="Use 'flexlora', or aggregate with fastagg.Aggregator and have the clients merge",
        )


def _parsed(config: object, client: str | None) -> AdapterConfig:
    if isinstance(config, (str, os.PathLike)):
        config = read_config(named_path(Path(config)), client)
    return AdapterConfig.of(config, client=client)
