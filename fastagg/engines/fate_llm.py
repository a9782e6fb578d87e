"""FATE and FATE-LLM: the arbiter's side of a model aggregation, in plain text.

    from fastagg.engines.fate_llm import AggregatorServer

    class Server(Seq2SeqFedAVGServer):
        exact = AggregatorServer(names, lora_config, method="flexlora")

        def on_federation(self, ctx, aggregator, agg_iter_idx):
            self.exact.model_aggregation(ctx)

FATE sends a model's trained parameters as a list of arrays without names, in the order of
``model.parameters()``, and puts the list that comes back into them one by one. Each party has a reply
of its own, so each is sent its own rank, and nothing changes on the clients' side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastagg.engines.state_dicts import Entry, StateDictRounds
from fastagg.errors import InvalidInput
from fastagg.method import Method

__all__ = ["AggregatorServer"]

Arrays = list[NDArray[Any]]

# What fate.arch.protocol.secure_aggregation calls its messages, under "fedavg" and "_model".
_SENT = "mixed_client_values"
_RETURNED = "aggregated_values"


class AggregatorServer(StateDictRounds):
    """What ``BaseAggregatorServer.model_aggregation`` does, by dW and for mixed ranks.

    Parties are named by their rank among the parties: "0", "1", ... FATE makes float64 of a model's
    parameters, and float32 of what comes back before it puts that into the model: here they are float32
    from the start, half the bytes. float16 stays float16.

    Args:
        names: the parameters' names in the order of the arrays, the same for all parties:
            ``[name for name, p in model.named_parameters() if p.requires_grad]``.
        prefix: of FATE's messages, its ``aggregator_name`` and "_model".

    The others: :class:`StateDictRounds`.

    Raises:
        InvalidInput: besides, no names, or one twice.
    """

    def __init__(
        self,
        names: Sequence[str],
        config: object,
        method: str | Method = "flexlora",
        *,
        prefix: str = "fedavg_model",
        clients: Mapping[Any, object] | None = None,
        skip_invalid: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(config, method, clients=clients, skip_invalid=skip_invalid, **options)
        self._names = tuple(names)
        self._prefix = prefix
        if not self._names or len(set(self._names)) < len(self._names):
            raise InvalidInput(
                "not the names of a model's parameters",
                field="names",
                expected="at least one name, and each of them once",
                got=f"{len(self._names)} names, {len(set(self._names))} of them different",
            )

    def model_aggregation(self, ctx: Any, ranks: Sequence[int] | None = None) -> None:
        """Receives one list of arrays from each party and replies with the party's own.

        Args:
            ctx: FATE's context of this aggregation.
            ranks: the parties that take part; None: the guest and all hosts.

        Raises:
            InvalidInput: no party, or updates that cannot be aggregated; no party has had a reply
                then. FATE ends the job.
            MemoryBudgetExceeded: the round does not fit into max_memory.
        """
        parties = [ctx.guest.rank, *ctx.hosts.ranks] if ranks is None else list(ranks)
        self._settle(self._fold(self._received(ctx, parties), "ranks"))
        replies = [(party, self.arrays(party)) for party in parties]
        for party, arrays in replies:
            ctx.parties[party].put(f"{self._prefix}_{_RETURNED}", arrays)

    def arrays(self, party: object) -> Arrays:
        """The party's hand-out as FATE takes it: one array for each name, in order.

        Raises:
            InvalidInput: as :meth:`handout`.
        """
        handed = self.handout(party)
        return [handed[name].numpy() for name in self._names]

    def _received(self, ctx: Any, parties: Sequence[int]) -> Iterator[Entry]:
        for party in parties:
            arrays, weight = ctx.parties[party].get(f"{self._prefix}_{_SENT}")
            yield str(party), 1 if weight is None else weight, arrays

    def _tensors(self, client: str, sent: Any) -> Mapping[str, Tensor]:
        if not isinstance(sent, (list, tuple)) or len(sent) != len(self._names):
            raise InvalidInput(
                "not one array for each name",
                client=client,
                field="names",
                expected=f"a list of {len(self._names)} arrays",
                got=f"{len(sent)}" if isinstance(sent, (list, tuple)) else type(sent).__name__,
                cure="Name the parameters of the party's model that are trained, in their order",
            )
        named = zip(self._names, sent, strict=True)
        return {name: _tensor(array, client, name) for name, array in named}

    def _dtype_of(self, part: Mapping[str, Tensor]) -> torch.dtype | None:
        wide = any(tensor.dtype == torch.float64 for tensor in part.values())
        return torch.float32 if wide else None


def _tensor(array: Any, client: str, name: str) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InvalidInput(
            "not an array of floating-point numbers",
            client=client,
            field=name,
            expected="a numpy array of float16, float32 or float64",
            got=f"{array.dtype} numbers" if isinstance(array, np.ndarray) else type(array).__name__,
            cure="Set FedArguments(aggregator='plaintext'): masked sums of factors are not dW",
        )
    # Off the wire an array may be read-only or of the other byte order, which a tensor cannot be.
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, native, ["C", "W"]))
