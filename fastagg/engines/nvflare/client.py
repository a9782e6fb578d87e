"""The client's side in a Client API script: a PEFT model's adapter in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import nvflare.client as flare
import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from fastagg.engines.nvflare.models import ASK, CONFIG, adapter_in, config_of, merges_in
from fastagg.errors import InvalidInput
from fastagg.federated.seeds import seed_of
from fastagg.peft_format.config import AdapterConfig
from fastagg.update import ClientUpdate
from fastagg.whole_round import aggregate

if TYPE_CHECKING:
    from peft import PeftModel

    from fastagg.adapter import Adapter

__all__ = ["AdapterClient"]


class AdapterClient:
    """Rounds of one client, whichever of the package's server sides it speaks to.

        flare.init()
        client = AdapterClient(model)
        for number in client.rounds():
            steps = train(model)
            client.send(steps)

    Args:
        model: a PEFT model with one adapter, "default"; its rank is the client's own.
        weight_field: of ``FLModel.meta``, under which what it counts for is sent.
        seed: of factors that begin afresh; the same for all clients.

    Attributes:
        received: what the server sent for the round, as it came, until :meth:`send`.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        weight_field: str = FLMetaKey.NUM_STEPS_CURRENT_ROUND,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.weight_field = weight_field
        self.seed = seed
        # What the tensors are, not whether they are being trained.
        self._fields = {**config_of(model.peft_config["default"]), "inference_mode": True}
        self._config = AdapterConfig.from_dict(self._fields)
        self.received: FLModel | None = None
        self._names: dict[str, str] = {}
        self._merged = 0
        self._began = False

    def rounds(self) -> Iterator[int]:
        """The rounds that this client takes part in, by number, from 0. The model has what the server
        sent when each begins: the client's own adapter, at its own rank, and under FLoRA the stacks
        merged into its base weights.

        Raises:
            InvalidInput: what the server sent does not fit the model.
        """
        while flare.is_running():
            received = flare.receive()
            if received is None:
                return
            if (received.meta or {}).get(ASK):
                flare.send(FLModel(params={}, meta={CONFIG: self._fields}))
                continue
            self.received = received
            self.take(received)
            yield received.current_round

    def send(self, weight: float, metrics: Mapping[str, float] | None = None) -> None:
        """Sends :meth:`answer`."""
        flare.send(self.answer(weight, metrics))
        self.received = None

    def take(self, received: FLModel) -> None:
        """Puts what the server sent into the model; :meth:`rounds` does it by itself.

        Raises:
            InvalidInput: it does not fit the model.
        """
        from fastagg.federated.clients.fresh_factors import draw_dead_ranks, draw_factors

        seed = seed_of(self.seed, "factors", received.current_round)
        merges = [(number, stack) for number, stack in merges_in(received) if number > self._merged]
        for number, stack in merges:
            self._merge(number, stack)
        adapter = adapter_in(received, self._config)
        if adapter is not None:
            self._load(adapter)
            draw_dead_ranks(self.model, seed)
        elif merges or self._began:
            draw_factors(self.model, seed)
        self._began = True

    def answer(self, weight: float, metrics: Mapping[str, float] | None = None) -> FLModel:
        """The adapter as it is now: a copy, under the keys that the server uses.

        Args:
            weight: what it counts for, such as the number of examples.
            metrics: for the server's model selection.
        """
        from peft import get_peft_model_state_dict

        # "auto" would ask the model hub whether the vocabulary grew.
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return FLModel(
            params_type=ParamsType.FULL,
            params={
                self._names.get(key, key): value.detach().to("cpu", copy=True)
                for key, value in state.items()
            },
            metrics=dict(metrics) if metrics is not None else None,
            meta={self.weight_field: weight, CONFIG: self._fields},
        )

    def _merge(self, number: int, stack: Adapter) -> None:
        if number != self._merged + 1:
            raise InvalidInput(
                "the base weights lack the stacks of earlier rounds",
                client=flare.get_site_name(),
                field="round",
                expected=str(self._merged + 1),
                got=str(number),
                cure="A client that began anew needs a job that begins anew or is resumed",
            )
        aggregate([ClientUpdate(stack)], "flora", device=self._device).merge_into(self.model)
        self._merged = number

    def _load(self, adapter: Adapter) -> None:
        from peft import set_peft_model_state_dict

        self._names = {span.key: span.source for span in adapter.layout.tensors}
        state = {key: adapter.state_dict()[source] for key, source in self._names.items()}
        for slot in adapter.layout.slots:
            rank, scaling = self._config.rank_of(slot.module), self._config.scaling_of(slot.module)
            a, b = state[slot.a.key], state[slot.b.key]
            if (rank, scaling) != (slot.rank, slot.scaling):
                # The best ranks come first in what the server hands out.
                state[slot.a.key] = _resized(a, 0, rank)
                state[slot.b.key] = _resized(b, 1, rank) * (slot.scaling / scaling)
        loaded: Any = set_peft_model_state_dict(self.model, state)
        if loaded.unexpected_keys:
            raise InvalidInput(
                "the server sent tensors that this model has no place for",
                client=flare.get_site_name(),
                field=loaded.unexpected_keys[0],
                expected=f"the modules of {self._fields.get('target_modules')}",
                cure="Let clients and server agree on target_modules",
            )

    @property
    def _device(self) -> str:
        return "auto" if next(self.model.parameters()).device.type == "cuda" else "cpu"


def _resized(factor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """The factor with this many ranks along a dimension: the first ones, or zeros added."""
    kept = factor.narrow(dim, 0, min(rank, factor.shape[dim]))
    shape = list(factor.shape)
    shape[dim] = rank - kept.shape[dim]
    return torch.cat([kept, factor.new_zeros(shape)], dim=dim)
