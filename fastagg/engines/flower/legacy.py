"""FastAgg as a strategy of Flower's older API, that of ``aggregate_fit``."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from logging import INFO, WARNING
from typing import Any, Literal

from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetPropertiesIns,
    Parameters,
    Scalar,
    log,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from fastagg.adapter import Adapter
from fastagg.engines.exchange import Exchange, Outcome
from fastagg.engines.flower.codec import from_npy, npy_of, to_npy, unwarned
from fastagg.engines.flower.fields import Introduction, read_config, read_introduction
from fastagg.engines.flower.legacy_fields import for_client, named, read_fields
from fastagg.engines.flower.metrics import counts, weighted_means
from fastagg.engines.flower.nodes import Node, Nodes, given_ranks
from fastagg.errors import InvalidInput
from fastagg.federated.messages import ClientFailure
from fastagg.method import Method

__all__ = ["FastAggFedAvg"]

MetricsFunction = Callable[[list[tuple[int, dict[str, Scalar]]]], dict[str, Scalar]]


class FastAggFedAvg(FedAvg):
    """:class:`FastAggStrategy` for a ``Server`` or ``ServerAppComponents`` of the older API.

    The server collects all answers of a round before the strategy sees the first, so their memory is the
    engine's. Clients answer with :func:`fit_result`, or with as many arrays as they were sent, in order.

    Args:
        method, initial, folder, resume, min_clients, options: as FastAggStrategy takes them.
        ranks: "query" asks each client's ``get_properties`` for its name and rank when it is met first
            (:func:`fastagg.engines.flower.legacy_client.properties`); "reply" asks nothing; or cid, or
            the name that a client states -> rank.
        query_timeout: seconds for that question.
        fit_metrics_aggregation_fn, evaluate_metrics_aggregation_fn: as FedAvg takes them; None: the
            means of each number, weighted by the examples, over those clients that have it.
        fraction_fit, fraction_evaluate, min_fit_clients, min_evaluate_clients, min_available_clients,
            evaluate_fn, on_fit_config_fn, on_evaluate_config_fn: as FedAvg takes them.

    Attributes:
        exchange: the clients, and each one's adapter.
        outcome: what became of the last round, until the next begins;  failures: of all rounds.

    Raises:
        InvalidInput: as :class:`fastagg.engines.exchange.Exchange`.
    """

    def __init__(
        self,
        method: str | Method = "flexlora",
        *,
        initial: Adapter | str | os.PathLike[str] | None = None,
        ranks: Mapping[str, int] | Literal["query", "reply"] = "query",
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        min_clients: int = 1,
        query_timeout: float = 120.0,
        fraction_fit: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_fit_clients: int = 2,
        min_evaluate_clients: int = 2,
        min_available_clients: int = 2,
        evaluate_fn: Any = None,
        on_fit_config_fn: Callable[[int], dict[str, Scalar]] | None = None,
        on_evaluate_config_fn: Callable[[int], dict[str, Scalar]] | None = None,
        fit_metrics_aggregation_fn: MetricsFunction | None = None,
        evaluate_metrics_aggregation_fn: MetricsFunction | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            fraction_fit=fraction_fit,
            fraction_evaluate=fraction_evaluate,
            min_fit_clients=min_fit_clients,
            min_evaluate_clients=min_evaluate_clients,
            min_available_clients=min_available_clients,
            evaluate_fn=evaluate_fn,
            on_fit_config_fn=on_fit_config_fn,
            on_evaluate_config_fn=on_evaluate_config_fn,
            fit_metrics_aggregation_fn=fit_metrics_aggregation_fn or _means,
            evaluate_metrics_aggregation_fn=evaluate_metrics_aggregation_fn or _means,
        )
        given = given_ranks(ranks)
        self.exchange = Exchange(
            method,
            initial=initial,
            ranks=given,
            min_clients=min_clients,
            folder=folder,
            resume=resume,
            **options,
        )
        self.outcome: Outcome | None = None
        self.failures: list[ClientFailure] = []
        self._query_timeout = query_timeout
        self._nodes = Nodes(self.exchange, given, ranks != "reply")
        # cid -> client of those that a round under way has asked; None: none is in progress.
        self._training: dict[Node, str] | None = None

    def __repr__(self) -> str:
        return f"FastAggFedAvg({self.exchange.method.name}, round {self.exchange.round})"

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """The result so far, or no parameters: each client gets its own."""
        return self._result()

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """For each of the clients that Flower's FedAvg samples its own adapter."""
        sampled = super().configure_fit(server_round, parameters, client_manager)
        if not sampled:
            return []
        clients, refused = self._meet([client for client, _ in sampled], client_manager)
        number = self.exchange.begin(clients.values())
        self._training = clients
        # It holds all that the last round added up.
        self.outcome = None
        for client, reason in refused.items():
            self.exchange.fail(client, reason)
        return [
            (proxy, FitIns(*self._instructions(clients[proxy.cid], number, ins.config)))
            for proxy, ins in sampled
            if proxy.cid in clients
        ]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Folds the results in, and ends the round.

        Returns:
            The parameters of the adapter of the largest rank (flora: the stack), None where the round
            did not count; and the metrics.
        """
        if self._training is None:
            return None, {}
        for failure in failures:
            if isinstance(failure, BaseException):
                # It does not say whose: that client counts as not having answered.
                log(WARNING, "aggregate_fit: %s: %s", type(failure).__name__, failure)
            elif failure[0].cid in self._training:
                proxy, result = failure
                self.exchange.fail(self._training[proxy.cid], result.status.message)
        measured = []
        for proxy, result in results:
            if proxy.cid in self._training and self._fold(self._training[proxy.cid], result):
                measured.append((result.num_examples, result.metrics))
        self._training = None
        outcome = self.outcome = self.exchange.finish()
        log(INFO, "aggregate_fit: took %d answers in", len(outcome.participants))
        for noticed in outcome.failures:
            log(WARNING, "\t> %s", noticed)
        self.failures.extend(outcome.failures)
        if outcome.problem is not None:
            log(WARNING, "Round %d does not count: %s", outcome.round, outcome.problem)
        metrics: dict[str, Scalar] = {}
        if measured and self.fit_metrics_aggregation_fn:
            metrics = self.fit_metrics_aggregation_fn(measured)
        metrics.update(counts(outcome))
        return (None if outcome.aggregate is None else self._result()), metrics

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """For each of the clients that Flower's FedAvg samples its own adapter."""
        sampled = super().configure_evaluate(server_round, parameters, client_manager)
        if not sampled:
            return []
        clients, _ = self._meet([client for client, _ in sampled], client_manager)
        number = self.exchange.round - 1
        return [
            (proxy, EvaluateIns(*self._instructions(clients[proxy.cid], number, ins.config)))
            for proxy, ins in sampled
            if proxy.cid in clients
        ]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """FedAvg's means, where there is anything to average."""
        if not any(result.num_examples for _, result in results):
            return None, {}
        return super().aggregate_evaluate(server_round, results, failures)

    def _meet(
        self, proxies: Sequence[ClientProxy], client_manager: ClientManager
    ) -> tuple[dict[Node, str], dict[str, str]]:
        ask = partial(self._ask, {proxy.cid: proxy for proxy in proxies})
        return self._nodes.meet([proxy.cid for proxy in proxies], ask, client_manager.all)

    def _ask(
        self, proxies: Mapping[Node, ClientProxy], nodes: Collection[Node]
    ) -> Iterable[tuple[Node, Introduction | InvalidInput]]:
        def asked(node: Node) -> tuple[Node, Introduction | InvalidInput]:
            try:
                said = proxies[node].get_properties(GetPropertiesIns({}), self._query_timeout, None)
                if said.status.code != Code.OK:
                    return node, Introduction()
                return node, read_introduction(read_fields(said.properties))
            except InvalidInput as error:
                return node, error
            except Exception as error:
                # Whatever a transport raises: a client without get_properties is known by its cid.
                log(INFO, "Client %s does not say who it is: %s", node, error)
                return node, Introduction()

        with ThreadPoolExecutor(max_workers=min(32, len(nodes))) as threads:
            return list(threads.map(asked, sorted(nodes, key=str)))

    def _instructions(
        self, client: str, number: int, config: Mapping[str, Scalar]
    ) -> tuple[Parameters, dict[str, Scalar]]:
        arrays, fields = for_client(self.exchange.outgoing(client), number)
        return _parameters(map(npy_of, arrays)), {**config, **fields}

    def _fold(self, client: str, result: FitRes) -> bool:
        """Takes an answer in, if it can be."""
        try:
            fields = read_fields(result.metrics, client)
            names = fields.get("tensors", self._sent_names(client))
            with unwarned():
                tensors = named(result.parameters.tensors, names, from_npy, client)
            config = read_config(fields, client)
        except InvalidInput as error:
            self.exchange.fail(client, str(error))
            return False
        return self.exchange.receive(client, tensors, result.num_examples, config) is None

    def _sent_names(self, client: str) -> list[tuple[str, str]]:
        """The keys and dtypes of what a client was sent, in order."""
        own = self.exchange.outgoing(client).adapter
        tensors = {} if own is None else own.state_dict()
        return [(key, str(tensor.dtype).removeprefix("torch.")) for key, tensor in tensors.items()]

    def _result(self) -> Parameters:
        result = self.exchange.result
        tensors = {} if result is None else result.state_dict()
        return _parameters(to_npy(tensor, key)[0] for key, tensor in tensors.items())


def _parameters(tensors: Iterable[bytes]) -> Parameters:
    return Parameters(list(tensors), "numpy.ndarray")


def _means(measured: list[tuple[int, dict[str, Scalar]]]) -> dict[str, Scalar]:
    return dict(weighted_means(measured))  # type: ignore[arg-type]
