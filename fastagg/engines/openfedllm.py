"""OpenFedLLM: in place of ``federated_learning.fed_global.global_aggregate``.

    from fastagg.engines.openfedllm import GlobalAggregate

    global_aggregate = GlobalAggregate(peft_config, method="flexlora")

The main scripts call it once a round with the state dicts of ``peft.get_peft_model_state_dict`` and put
what it returns into the one model that all clients start from. Where clients have models of their own
rank, each begins with ``global_aggregate.handout(client, like=local_dict_list[client])``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastagg.engines.state_dicts import Entry, StateDict, StateDictRounds
from fastagg.errors import InvalidInput, short

__all__ = ["GlobalAggregate"]

# What these do between the rounds is written in terms of averaged factors.
_OF_FACTORS = ("scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")


class GlobalAggregate(StateDictRounds):
    """The hook, configured once: call it as ``global_aggregate`` is called.

    Clients are named by their index: "0", "1", ... Arguments: :class:`StateDictRounds`.
    """

    def __call__(
        self,
        fed_args: Any,
        global_dict: Mapping[str, Tensor],
        local_dict_list: Sequence[Mapping[str, Tensor]],
        sample_num_list: Sequence[float],
        clients_this_round: Sequence[int],
        round_idx: int,
        proxy_dict: Any = None,
        opt_proxy_dict: Any = None,
        auxiliary_info: Any = None,
    ) -> tuple[StateDict, None]:
        """Aggregates the clients of this round.

        Args:
            fed_args: ``fed_alg`` has to be one whose server averages: fedavg, fedprox or local.
            global_dict: the global adapter before the round; its keys and ranks are those of the result.
            local_dict_list, sample_num_list: of all clients, by index.
            clients_this_round: the indices that count.

        The others are those of server optimisers and of SCAFFOLD, and are not used.

        Returns:
            The new global dict, and None in place of SCAFFOLD's auxiliary. No argument is changed.

        Raises:
            InvalidInput: another algorithm, no client, or updates that cannot be aggregated.
            MemoryBudgetExceeded: the round does not fit into max_memory.
        """
        algorithm = getattr(fed_args, "fed_alg", "fedavg")
        if algorithm in _OF_FACTORS:
            raise InvalidInput(
                "a server optimiser on averaged factors is no step on dW",
                field="fed_alg",
                expected="'fedavg' or 'fedprox'",
                got=repr(algorithm),
                cure="Use fedavg here; fastagg.federated.Server has FedAvgM, FedAdam and FedYogi on dW",
            )
        entries = self._entries(local_dict_list, sample_num_list, clients_this_round)
        return self._round(entries, global_dict, "clients_this_round"), None

    def _entries(
        self,
        states: Sequence[Mapping[str, Tensor]],
        counts: Sequence[float],
        clients: Sequence[int],
    ) -> Iterator[Entry]:
        for client in clients:
            if not 0 <= client < min(len(states), len(counts)):
                raise InvalidInput(
                    "no such client",
                    client=str(client),
                    field="clients_this_round",
                    expected=f"an index below {len(states)}, the length of local_dict_list, and "
                    f"{len(counts)}, that of sample_num_list",
                    got=short(client),
                )
            yield str(client), counts[client], states[client]
