"""FastAgg as a strategy of Flower's Message API."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fastagg.adapter import Adapter
from fastagg.engines.exchange import Exchange, Outcome, Outgoing
from fastagg.engines.flower.arrivals import Arrivals
from fastagg.engines.flower.codec import encode
from fastagg.engines.flower.metrics import counts, weighted_means
from fastagg.engines.flower.nodes import Node, Nodes, given_ranks
from fastagg.engines.flower.queries import ask
from fastagg.engines.flower.records import for_node, read_answer, read_metrics, records_of
from fastagg.errors import InvalidInput
from fastagg.federated.messages import ClientFailure
from fastagg.method import Method

__all__ = ["FastAggStrategy"]

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]
Evaluation = Callable[[int, ArrayRecord], MetricRecord | None]


class FastAggStrategy(FedAvg):
    """Federated LoRA in which every node has an adapter of its own rank.

    Each round, every sampled node is sent its own adapter; its answer is validated whole, folded in as
    it arrives and dropped: the memory is that of one answer, the accumulator, and one adapter for each
    kind of node. A node that fails, or whose answer cannot be aggregated, is left out of the round and
    served again in the next.

    Args:
        method: as :class:`fastagg.Aggregator` takes it: "flexlora", "flora", ...
        initial: an adapter, or the folder of one, from which the first adapters of all ranks are cut.
            None: nodes begin with their own, and their first answer says what that looks like.
        ranks: "query" asks every node for its name and its rank when it is met first
            (:func:`query_reply`); "reply" asks nothing: nodes are known by their ids, and by what
            their first answers are; or node id, or the name that a node states -> rank.
        folder: where every finished round is saved, all of it or nothing.
        resume: go on from the last round in ``folder``, if there is one. Nodes have other ids in
            another run: they keep their adapters where they state a name.
        min_clients: with fewer usable answers a round does not count.
        query_timeout: seconds to wait for nodes that are asked who they are.
        fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes,
            weighted_by_key, arrayrecord_key, configrecord_key: as Flower's FedAvg takes them.
        train_metrics_aggr_fn, evaluate_metrics_aggr_fn: as FedAvg takes them; None: the means of each
            metric, weighted by ``weighted_by_key``, over those nodes that have it.
        options: those of :class:`fastagg.Aggregator`: max_memory, missing, accumulator, route,
            device, dtype, seed.

    Attributes:
        exchange: the clients, and each one's adapter.
        outcome: what became of the last round, until the next begins.
        failures: of all rounds, as they were noticed.

    Raises:
        InvalidInput: as :class:`fastagg.engines.exchange.Exchange`.
    """

    def __init__(
        self,
        method: str | Method = "flexlora",
        *,
        initial: Adapter | str | os.PathLike[str] | None = None,
        ranks: Mapping[int, int] | Mapping[str, int] | Literal["query", "reply"] = "query",
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        min_clients: int = 1,
        query_timeout: float = 120.0,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsFunction | None = None,
        evaluate_metrics_aggr_fn: MetricsFunction | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
            train_metrics_aggr_fn=train_metrics_aggr_fn or _means,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn or _means,
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
        self._ranks = ranks
        self._query_timeout = query_timeout
        self._nodes = Nodes(self.exchange, given, ranks != "reply")
        # Whom the messages under way went to: node id -> client; None: no round is in progress.
        self._training: dict[Node, str] | None = None
        self._evaluating: dict[Node, str] = {}
        self._refused: list[ClientFailure] = []
        # Rounds of Flower's count that an earlier run has finished.
        self._before = 0

    def summary(self) -> None:
        """Logs the strategy's configuration."""
        exchange = self.exchange
        log(INFO, "\t├──> FastAgg: %s, round %d comes next", exchange.method.name, exchange.round)
        log(INFO, "\t│\t└── Ranks: %s", self._ranks)
        super().summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluation | None = None,
    ) -> Result:
        """Runs the rounds, as Flower's strategies do, but takes every answer in as it arrives.

        Args:
            initial_arrays: Flower's global model, which there is none of here: the adapter to begin with
                is the strategy's ``initial``.
            num_rounds: in all, those that are finished already among them.
            timeout: seconds for a round's answers; who has not answered by then has failed.
            evaluate_fn: is given the round and the arrays of the result.

        Returns:
            Flower's Result. ``arrays`` is one adapter, of the largest rank among the nodes; for
            flora the last round's stack. The metrics of training say how many took part and failed:
            fastagg-participants, fastagg-failures, fastagg-seconds.

        Raises:
            InvalidInput: initial_arrays were given, or a hand-out does not fit into a node's dtype.
            MemoryBudgetExceeded: a hand-out does not fit into max_memory.
            OSError: a round could not be saved.
        """
        if initial_arrays:
            raise InvalidInput(
                "each node gets an adapter of its own, so there is no global model to begin with",
                field="initial_arrays",
                cure="Pass the strategy initial=fastagg.Adapter(state_dict, config), or a folder",
            )
        self._before = before = self.exchange.round - 1
        arrays = self._result()
        result = super().start(
            Arrivals(grid),
            arrays,
            max(0, num_rounds - before),
            timeout,
            train_config,
            evaluate_config,
            evaluate_fn and (lambda number, now: evaluate_fn(number + before, now)),
        )
        if not result.arrays:
            result.arrays = arrays
        for metrics in (
            result.train_metrics_clientapp,
            result.evaluate_metrics_clientapp,
            result.evaluate_metrics_serverapp,
        ):
            counted = {number + before: record for number, record in metrics.items()}
            metrics.clear()
            metrics.update(counted)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each of the nodes that Flower's FedAvg samples, with its own adapter."""
        sampled = list(super().configure_train(server_round + self._before, arrays, config, grid))
        if not sampled:
            return []
        clients, refused = self._meet(sampled, grid)
        number = self.exchange.begin(clients.values())
        self._training = clients
        # It holds all that the last round added up.
        self.outcome = None
        for client, reason in refused.items():
            self.exchange.fail(client, reason)
        outgoing = {node: self.exchange.outgoing(client) for node, client in clients.items()}
        return self._messages(sampled, outgoing, number)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Folds replies in one by one, as the iterable yields them, and ends the round.

        Returns:
            The arrays of the result, None where the round did not count, and the metrics.
        """
        if self._training is None:
            return None, None
        measured = []
        for reply in replies:
            metrics = self._fold(reply, self._training)
            # Before the next one is waited for: it holds all that the node sent.
            del reply
            if metrics is not None:
                measured.append(RecordDict({"metrics": metrics}))
        self._training = None
        outcome = self.outcome = self.exchange.finish()
        self._report("aggregate_train", len(outcome.participants), outcome.failures)
        if outcome.problem is not None:
            log(WARNING, "Round %d does not count: %s", outcome.round, outcome.problem)
        means = self.train_metrics_aggr_fn(measured, self.weighted_by_key) if measured else {}
        metrics = MetricRecord({**means, **counts(outcome)})
        return (None if outcome.aggregate is None else self._result()), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each of the nodes that Flower's FedAvg samples, with its own adapter; none for
        a node that has none yet."""
        sampled = list(super().configure_evaluate(server_round + self._before, arrays, config, grid))
        if not sampled:
            return []
        clients, refused = self._meet(sampled, grid)
        number = self.exchange.round - 1
        self._refused = [ClientFailure(client, number, reason) for client, reason in refused.items()]
        outgoing = {node: self.exchange.outgoing(client) for node, client in clients.items()}
        served = {node: what for node, what in outgoing.items() if what.adapter or what.merges}
        self._evaluating = {node: clients[node] for node in served}
        return self._messages(sampled, served, number)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The means of what the nodes measured with their own adapters."""
        due, number = dict(self._evaluating), self.exchange.round - 1
        failures, self._refused = self._refused, []
        measured = []
        for reply in replies:
            client = due.pop(reply.metadata.src_node_id, None)
            if client is None:
                _log_stray(reply)
            elif reply.has_error():
                failures.append(ClientFailure(client, number, str(reply.error.reason)))
            else:
                try:
                    _, metrics = read_metrics(reply.content, self.weighted_by_key, client)
                    measured.append(RecordDict({"metrics": metrics}))
                except InvalidInput as error:
                    failures.append(ClientFailure(client, number, str(error)))
        failures += [ClientFailure(client, number, "has not answered") for client in due.values()]
        self._evaluating = {}
        if measured or failures:
            self._report("aggregate_evaluate", len(measured), failures)
        return self.evaluate_metrics_aggr_fn(measured, self.weighted_by_key) if measured else None

    def _meet(
        self, sampled: Sequence[Message], grid: Grid
    ) -> tuple[dict[Node, str], dict[str, str]]:
        number, timeout = self.exchange.round, self._query_timeout
        return self._nodes.meet(
            [_node(message) for message in sampled],
            lambda nodes: ask(nodes, grid, number, timeout),
            grid.get_node_ids,
        )

    def _fold(self, reply: Message, clients: Mapping[Node, str]) -> MetricRecord | None:
        """Takes an answer in; returns its metrics, None where it failed."""
        client = clients.get(reply.metadata.src_node_id)
        if client is None:
            _log_stray(reply)
            return None
        if reply.has_error():
            self.exchange.fail(client, str(reply.error.reason))
            return None
        try:
            answer = read_answer(reply, self.weighted_by_key, client)
        except InvalidInput as error:
            self.exchange.fail(client, str(error))
            return None
        failure = self.exchange.receive(client, answer.tensors, answer.weight, answer.config)
        return answer.metrics if failure is None else None

    def _messages(
        self, sampled: Sequence[Message], outgoing: Mapping[Node, Outgoing], number: int
    ) -> list[Message]:
        """Flower's messages with each node's own content in the place of one for all."""
        known: dict[int, tuple[Adapter, ArrayRecord]] = {}

        def encoded(adapter: Adapter) -> ArrayRecord:
            # Nodes of one kind share their numbers: these are encoded once.
            place = adapter.flat.data_ptr()
            if place not in known:
                known[place] = adapter, encode(adapter.state_dict())
            return known[place][1]

        messages = []
        for message in sampled:
            if _node(message) in outgoing:
                message.content = for_node(
                    outgoing[_node(message)],
                    number,
                    self.arrayrecord_key,
                    records_of(message.content, ConfigRecord),
                    encoded,
                )
                messages.append(message)
        return messages

    def _report(self, step: str, answers: int, failures: Sequence[ClientFailure]) -> None:
        log(INFO, "%s: took %d answers in, %d failures", step, answers, len(failures))
        for failure in failures:
            log(WARNING, "\t> %s", failure)
        self.failures.extend(failures)

    def _result(self) -> ArrayRecord:
        result = self.exchange.result
        return ArrayRecord() if result is None else encode(result.state_dict())


def _node(message: Message) -> int:
    return message.metadata.dst_node_id


def _log_stray(reply: Message) -> None:
    # Flower says so where a reply is lost on its way; its sender will count as not having answered.
    reason = reply.error.reason if reply.has_error() else "its node was not asked"
    log(WARNING, "A reply that belongs to no client of this round: %s", reason)


def _means(records: list[RecordDict], weighted_by: str) -> MetricRecord:
    found = (metrics for record in records for metrics in records_of(record, MetricRecord).values())
    means = weighted_means((float(metrics[weighted_by]), metrics) for metrics in found)  # type: ignore[arg-type]
    means.pop(weighted_by, None)
    return MetricRecord(means)  # type: ignore[arg-type]
