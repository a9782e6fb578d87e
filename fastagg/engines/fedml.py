"""FedML: around a ``fedml.core.ServerAggregator``, whose ``aggregate`` it takes over.

    from fastagg.engines.fedml import ServerAggregator

    aggregator = ServerAggregator(LLMAggregator(model, args, ...), lora_config, method="flexlora")
    FedMLRunner(args, device, dataset, model, trainer, aggregator).run()

All else, such as the hooks before and after the aggregation, loading, testing and saving, stays the
wrapped aggregator's. FedML sends one global model to all clients; where they are of their own ranks,
``FedMLServerManager`` has to send ``aggregator.handout(index)`` in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastagg.engines.state_dicts import Entry, StateDict, StateDictRounds
from fastagg.errors import InvalidInput, short
from fastagg.method import Method

__all__ = ["ServerAggregator"]


class ServerAggregator(StateDictRounds):
    """A server aggregator that averages exactly what the wrapped one would average factor by factor.

    Clients are named by their place in the list that FedML passes: "0", "1", ...

    Args:
        aggregator: the application's own ``fedml.core.ServerAggregator``. Its ``get_model_params()``
            has the keys and ranks of what :meth:`aggregate` returns.

    The others: :class:`StateDictRounds`.
    """

    def __init__(
        self,
        aggregator: Any,
        config: object,
        method: str | Method = "flexlora",
        *,
        clients: Mapping[Any, object] | None = None,
        skip_invalid: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(config, method, clients=clients, skip_invalid=skip_invalid, **options)
        self._aggregator = aggregator

    def aggregate(
        self, raw_client_model_or_grad_list: Sequence[tuple[float, Mapping[str, Tensor]]]
    ) -> StateDict:
        """Aggregates a round.

        Args:
            raw_client_model_or_grad_list: (number of examples, state dict) of each client.

        Returns:
            The wrapped aggregator's model parameters, its adapter brought up to date. No argument is
            changed.

        Raises:
            InvalidInput: no client, something else than such pairs, or updates that cannot be
                aggregated.
            MemoryBudgetExceeded: the round does not fit into max_memory.
        """
        model = self._aggregator.get_model_params()
        entries = _entries(raw_client_model_or_grad_list)
        return self._round(entries, model, "raw_client_model_or_grad_list")

    def __getattr__(self, name: str) -> Any:
        # Underscored names are this class's own: while it is being made or unpickled they are missing.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._aggregator, name)


def _entries(pairs: Sequence[Any]) -> Iterator[Entry]:
    for place, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidInput(
                "not a client's update",
                client=str(place),
                field="raw_client_model_or_grad_list",
                expected="(number of examples, state dict)",
                got=short(pair),
                cure="Set federated_optimizer to FedAvg: others send more than a model",
            )
        yield str(place), pair[0], pair[1]
