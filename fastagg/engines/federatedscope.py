"""FederatedScope: an aggregator for ``federatedscope.core.aggregators``' protocol.

    from fastagg.engines.federatedscope import Aggregator

    def get_aggregator(method, model=None, device=None, online=False, config=None):
        return Aggregator(lora_config, method="flexlora", model=model, config=config)

The server loads what ``aggregate`` returns into its own model and broadcasts that; where clients are of
their own ranks, its ``broadcast_model_para`` sends each ``self.aggregator.handout(client_id)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagg.engines.state_dicts import Entry, StateDict, StateDictRounds
from fastagg.errors import InvalidInput, short
from fastagg.method import Method
from fastagg.whole_file import whole_file

__all__ = ["Aggregator"]


class Aggregator(StateDictRounds):
    """Aggregates like FederatedScope's ``ClientsAvgAggregator``, but dW instead of the factors.

    Clients are named by FederatedScope's ids, "1", "2", ..., which it passes beside their feedback. In
    asynchronous courses an update may be stale, and beside a newer one of the same client; that one is
    named "1, stale by 2". Every update counts by its number of examples, or equally under
    ``federate.ignore_weight``.

    Args:
        model: the server's model, whose ``state_dict()`` has the keys and ranks of what
            :meth:`aggregate` returns.
        config: FederatedScope's own configuration, None for its defaults.
        decode: turns what is no tensor in a message into one. The distributed mode sends texts and
            lists; pass ``federatedscope.core.auxiliaries.utils.param2tensor`` there (it unpickles what
            clients sent).
        lora: the clients' LoRA configuration.

    The others: :class:`StateDictRounds`.

    Raises:
        InvalidInput: besides, a course with secret sharing or online aggregation.
    """

    def __init__(
        self,
        lora: object,
        method: str | Method = "flexlora",
        *,
        model: Any,
        config: Any = None,
        decode: Callable[[Any], Tensor] | None = None,
        clients: Mapping[Any, object] | None = None,
        skip_invalid: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(lora, method, clients=clients, skip_invalid=skip_invalid, **options)
        federate = getattr(config, "federate", None)
        for field, why in (
            ("use_ss", "under secret sharing only sums of all clients' tensors are known"),
            ("online_aggr", "online aggregation averages the factors before they come here"),
        ):
            if getattr(federate, field, False):
                raise InvalidInput(
                    f"{why}, and sums of factors are not dW",
                    field=f"federate.{field}",
                    expected=False,
                    got=True,
                )
        self.model = model
        self.cfg = config
        self._decode = decode
        self._equally = bool(getattr(federate, "ignore_weight", False))

    def aggregate(self, agg_info: Mapping[str, Any]) -> StateDict:
        """Aggregates a round.

        Args:
            agg_info: ``client_feedback``, a list of (number of examples, state dict), and
                ``staleness``, a list of (client id, staleness) in the same order; without it clients
                are named by their place.

        Returns:
            The server model's state dict, its adapter brought up to date. No argument is changed.

        Raises:
            InvalidInput: no client, something else than such pairs, or updates that cannot be
                aggregated.
            MemoryBudgetExceeded: the round does not fit into max_memory.
        """
        return self._round(self._entries(agg_info), self.model.state_dict(), "client_feedback")

    def update(self, model_parameters: Mapping[str, Tensor]) -> None:
        """Loads parameters into the server's model."""
        self.model.load_state_dict(model_parameters, strict=False)

    def save_model(self, path: str | os.PathLike[str], cur_round: int = -1) -> None:
        """Writes the server's model and the round as FederatedScope does, but whole or not at all."""
        with whole_file(path) as made:
            torch.save({"cur_round": cur_round, "model": self.model.state_dict()}, made)

    def load_model(self, path: str | os.PathLike[str]) -> int:
        """Loads what :meth:`save_model` wrote; returns its round.

        Raises:
            InvalidInput: there is no such file.
        """
        if not Path(path).is_file():
            raise InvalidInput(f"there is no file {path}", field="path")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["model"])
        return int(saved["cur_round"])

    def _entries(self, agg_info: Mapping[str, Any]) -> Iterator[Entry]:
        feedback = agg_info["client_feedback"]
        names = _names(agg_info.get("staleness"), len(feedback))
        for name, pair in zip(names, feedback, strict=True):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise InvalidInput(
                    "not a client's feedback",
                    client=name,
                    field="client_feedback",
                    expected="(number of examples, state dict)",
                    got=short(pair),
                )
            count, state = pair
            yield name, 1 if self._equally else count, state

    def _tensors(self, client: str, sent: Any) -> Mapping[str, Tensor]:
        state = super()._tensors(client, sent)
        return {key: self._tensor(value, client, key) for key, value in state.items()}

    def _tensor(self, value: Any, client: str, key: str) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if self._decode is None:
            raise InvalidInput(
                "not a tensor",
                client=client,
                field=key,
                expected="a torch.Tensor",
                got=type(value).__name__,
                cure="In the distributed mode pass decode=param2tensor, of "
                "federatedscope.core.auxiliaries.utils",
            )
        return self._decode(value)


def _names(staleness: Any, count: int) -> list[str]:
    if staleness is None:
        return [str(place) for place in range(count)]
    if len(staleness) != count:
        raise InvalidInput(
            "not one client id for each feedback",
            field="staleness",
            expected=count,
            got=len(staleness),
        )
    names: list[str] = []
    for client, age in staleness:
        names.append(str(client) if str(client) not in names else f"{client}, stale by {age}")
    return names
