"""What a federated engine's server does with adapters, whatever the engine: each client's own, from
round to round, over any transport.

    exchange = Exchange("flexlora", initial=fresh_adapter, folder="rounds")
    exchange.begin(["ann", "ben"])
    send("ann", exchange.outgoing("ann"))
    exchange.receive("ann", tensors, weight=1200)      # folded in as it arrives
    outcome = exchange.finish()
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastagg.adapter import Adapter
from fastagg.aggregation import Aggregate
from fastagg.aggregator import Aggregator
from fastagg.engines.first_adapters import at_ranks, live, zeros
from fastagg.engines.saved_rounds import SavedRounds
from fastagg.engines.standing import Standing, alike
from fastagg.errors import InvalidInput, MemoryBudgetExceeded, short
from fastagg.federated.messages import ClientFailure
from fastagg.federated.seeds import seed_of
from fastagg.method import Method
from fastagg.peft_format.config import AdapterConfig
from fastagg.update import ClientUpdate
from fastagg.whole_round import aggregate

__all__ = ["Exchange", "Outcome", "Outgoing"]


@dataclass(frozen=True, eq=False)
class Outgoing:
    """What a client begins a round with.

    Attributes:
        round: the round that begins, from 1.
        adapter: the client's own, at its own ranks, keys, scalings and dtypes; None: it starts afresh.
        merges: (round, stack) that the client adds to its base weights first, each round's once, the
            oldest first; where clients merge (FLoRA), else empty.
    """

    round: int
    adapter: Adapter | None
    merges: tuple[tuple[int, Adapter], ...] = ()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a round.

    Attributes:
        round: its number, from 1.
        aggregate: of the round's updates; None where it is to be repeated, for the reason ``problem``.
        participants: the clients whose updates are in it, sorted.
        failures: of clients, in the order in which they were noticed.
        seconds: the server's own work: validating, folding in, handing out, saving.
    """

    round: int
    aggregate: Aggregate | None
    participants: tuple[str, ...]
    failures: tuple[ClientFailure, ...]
    problem: str | None
    seconds: float


@dataclass(eq=False)
class _Round:
    """A round in progress.

    Attributes:
        due: who has not answered; None: whoever answers takes part.
        joining: what the adapters of those look like who are no clients yet, or have changed theirs.
    """

    aggregator: Aggregator
    participants: frozenset[str]
    due: set[str] | None
    heard: set[str] = field(default_factory=set)
    joining: dict[str, Adapter] = field(default_factory=dict)
    failures: list[ClientFailure] = field(default_factory=list)
    seconds: float = 0.0


class Exchange:
    """Rounds of clients that come and go, each with an adapter of its own.

    Args:
        method: as :class:`fastagg.Aggregator` takes it.
        initial: an adapter, or the folder of one, from which the first adapters of all ranks are cut:
            its modules, its configuration, fresh factors. None: clients begin with their own, and
            their first answer says what that looks like.
        ranks: client -> rank, where the server decides on it.
        min_clients: with fewer usable updates a round does not count.
        folder: where every finished round is saved, all of it or nothing; None: nowhere.
        resume: go on from the last round that was saved in ``folder``, if there is one.
        options: those of :class:`fastagg.Aggregator`: max_memory, missing, accumulator, route,
            device, dtype, seed.

    Clients whose adapters differ in their numbers alone share one in memory. An Exchange is not for
    several threads at once.

    Raises:
        InvalidInput: an option that does not exist; ``ranks`` without ``initial``; or saved rounds that
            are not to be resumed, or are of another method.
    """

    def __init__(
        self,
        method: str | Method = "flexlora",
        *,
        initial: Adapter | str | os.PathLike[str] | None = None,
        ranks: Mapping[str, int] | None = None,
        min_clients: int = 1,
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        **options: Any,
    ) -> None:
        plain = Aggregator(method, **options)
        self.method = plain.method
        self.min_clients = _checked_count(min_clients)
        self._merging = not self.method.handout.ranked
        self._options = options
        self._plain = plain
        self._initial = Adapter.load(initial) if isinstance(initial, (str, os.PathLike)) else initial
        self._ranks = dict(ranks or {})
        if self._ranks and self._initial is None:
            raise InvalidInput(
                "ranks can be given to clients only with an adapter to cut theirs from",
                field="initial",
                expected="a fresh adapter, or the folder of one",
                got="None",
            )
        self._saved = None if folder is None else SavedRounds(folder, self.method.name, resume=resume)
        self._standing = Standing() if self._saved is None else self._saved.last()
        self._round: _Round | None = None
        # (round, configuration) -> the fresh adapter that all such clients get.
        self._cut: dict[tuple[int, str], Adapter] = {}

    @property
    def round(self) -> int:
        """The round that begins or is in progress, from 1."""
        return self._standing.finished + 1

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients that are known, sorted."""
        return self._standing.clients

    @property
    def result(self) -> Adapter | None:
        """What the rounds have come to, in one adapter: that of the client with the largest rank; where
        clients merge (FLoRA), the last round's stack. Before the first round the initial adapter."""
        if self._merging:
            return self._standing.stacks[-1] if self._standing.stacks else self._initial
        return max(self._standing.adapters, key=_largest_rank, default=self._initial)

    def adapter(self, client: str) -> Adapter:
        """A client's adapter as it stands.

        Raises:
            InvalidInput: no such client.
        """
        shared = self._standing.adapter(client)
        return Adapter.from_flat(shared.flat, shared.layout, shared.config, name=client)

    def enrol(
        self, client: str, config: Mapping[str, Any] | None = None, *, rank: int | None = None
    ) -> None:
        """Makes a client known before it trains, or changes what its adapter looks like.

        Its adapter is the best approximation of what the others have come to, a fresh one in round 1.

        Args:
            config: the fields of its ``adapter_config.json``.
            rank: its rank, with the rest of the initial adapter's configuration. Neither: the rank that
                ``ranks`` gives it, or the initial adapter's own.

        Without an initial adapter nothing can be made for it: it becomes known by its first answer.

        Raises:
            InvalidInput: an unusable rank or configuration, or one that does not fit to the others'.
        """
        if self._initial is None:
            return
        if config is None:
            config = self._decided_config(self._initial, client, rank)
        fresh = self._fresh(self._initial, AdapterConfig.from_dict(config, client=client))
        self._check_together(client, fresh)
        self._standing = self._with_client(self._standing, client, fresh)

    def merged_through(self, client: str, round: int) -> None:
        """A client says that it has merged the stacks up to this round's and no others (FLoRA): one that
        was restarted may have fewer than it was known to have."""
        if self._merging:
            self._standing = self._standing.with_merged(client, round)

    def outgoing(self, client: str) -> Outgoing:
        """What a client begins the round with that is in progress or comes next; as often as it asks.

        A client that is not known is enrolled, where there is an initial adapter.

        Raises:
            InvalidInput: as :meth:`enrol`.
        """
        if client not in self._standing:
            self.enrol(client)
        adapter = self.adapter(client) if client in self._standing else None
        if self._merging and adapter is not None:
            # What was trained is in the base weights: the next factors are fresh ones.
            adapter = None if self._initial is None else self._fresh(self._initial, adapter.config)
        return Outgoing(self.round, adapter, self._standing.missed(client))

    def begin(self, participants: Iterable[str] | None = None) -> int:
        """Begins a round and returns its number.

        Args:
            participants: whose answers are due; None: whoever answers takes part.

        Raises:
            InvalidInput: a round is in progress, or a client is named twice.
            MemoryBudgetExceeded: the round does not fit into max_memory.
        """
        if self._round is not None:
            raise InvalidInput(f"round {self.round} is in progress", cure="Call finish() first")
        named = [] if participants is None else list(participants)
        if len(set(named)) < len(named):
            raise InvalidInput("a client takes part once", field="participants", got=short(named))
        aggregator = Aggregator(self.method, **self._options)
        if named and all(client in self._standing for client in named):
            headers = [(client, self._standing.adapter(client)) for client in sorted(named)]
            aggregator.expect((client, own.layout, own.config) for client, own in headers)
        due = None if participants is None else set(named)
        self._round = _Round(aggregator, frozenset(named), due)
        return self.round

    def receive(
        self,
        client: str,
        tensors: Mapping[str, torch.Tensor],
        weight: float,
        config: Mapping[str, Any] | None = None,
    ) -> ClientFailure | None:
        """Takes a client's answer in, all of it or nothing; afterwards nothing of it is held but its
        part in the sum.

        Args:
            tensors: the adapter's, with PEFT's keys under any prefix, on the CPU or a GPU.
            weight: how much it counts, its number of examples as a rule.
            config: the fields of its ``adapter_config.json``; None: those that it was handed, or would
                have been.

        Returns:
            None, or why the answer was refused; the client has failed then, and the round goes on.

        Raises:
            InvalidInput: no round is in progress.
        """
        current, started = self._in_progress(), time.perf_counter()
        try:
            self._check_due(current, client)
            if config is None:
                config = self._config_of(client)
            update = ClientUpdate(Adapter(tensors, config, name=client), weight, client)
            current.aggregator.add(update)
        except (InvalidInput, MemoryBudgetExceeded) as error:
            failure = self._failed(current, client, str(error))
            failure.__cause__ = error
            return failure
        finally:
            current.seconds += time.perf_counter() - started
        self._answered(current, client)
        if not self._standing.is_like(client, update.adapter):
            # One for each kind: in a first round all clients come with adapters of their own.
            known = (own for own in current.joining.values() if alike(own, update.adapter))
            current.joining[client] = next(known, None) or zeros(
                update.adapter.layout, update.adapter.config, name=client
            )
        return None

    def fail(self, client: str, reason: str) -> ClientFailure:
        """Records that a participant has no update this round: it timed out, crashed, or sent an error.

        Raises:
            InvalidInput: no round is in progress.
        """
        return self._failed(self._in_progress(), client, reason)

    def finish(self) -> Outcome:
        """Ends the round: participants that have not answered have failed, every client's adapter
        becomes the aggregate at its own rank, also of those that took no part, and the round is saved.

        With too few updates, or updates without an average, nothing changes and the next round has the
        same number. After an error neither.

        Raises:
            InvalidInput: no round is in progress, or a hand-out does not fit into a client's dtype.
            MemoryBudgetExceeded: a hand-out does not fit into max_memory.
            OSError: the round could not be saved.
        """
        current, started = self._in_progress(), time.perf_counter()
        for client in sorted(current.due or ()):
            self._failed(current, client, "has not answered")
        self._round = None
        number, participants = self.round, current.aggregator.clients
        result, problem = None, None
        if len(participants) < self.min_clients:
            problem = f"{len(participants)} usable updates came, and min_clients is {self.min_clients}"
        else:
            try:
                result = current.aggregator.finalize()
            except InvalidInput as error:
                problem = str(error)
        if result is not None:
            standing = self._after(result, current, participants)
            if self._saved is not None:
                standing = self._saved.save(standing)
            self._standing = standing
        return Outcome(
            number,
            result,
            participants,
            tuple(current.failures),
            problem,
            current.seconds + time.perf_counter() - started,
        )

    def _after(self, result: Aggregate, current: _Round, participants: Iterable[str]) -> Standing:
        standing = self._standing
        for client, adapter in sorted(current.joining.items()):
            standing = self._with_client(standing, client, adapter)
        if self._merging:
            return standing.merged(participants, result.stacked())
        seed = self._seed("dead ranks")
        return standing.with_adapters(
            [live(result.adapter(like=adapter), seed) for adapter in standing.adapters]
        )

    def _with_client(self, standing: Standing, client: str, adapter: Adapter) -> Standing:
        """The standing with a client whose adapter looks like this one."""
        if standing.finished and not self._merging and not standing.has_like(adapter):
            # From the smallest rank to the largest: where several have a module, the best is the last.
            for known in sorted(standing.adapters, key=_largest_rank):
                update = ClientUpdate(known, client_id="known")
                alone = aggregate(
                    [update],
                    self.method,
                    route=self._plain.route,
                    device=self._plain.device.type,
                    seed=self._plain.seed,
                )
                adapter = alone.adapter(like=adapter)
            adapter = live(adapter, self._seed("dead ranks"))
        return standing.with_client(client, adapter)

    def _fresh(self, initial: Adapter, config: AdapterConfig) -> Adapter:
        key = self.round, config.canonical
        if key not in self._cut:
            self._cut = {known: own for known, own in self._cut.items() if known[0] == self.round}
            self._cut[key] = at_ranks(initial, config, self._seed("first adapters"))
        return self._cut[key]

    def _decided_config(
        self, initial: Adapter, client: str, rank: int | None = None
    ) -> Mapping[str, Any]:
        rank = rank if rank is not None else self._ranks.get(client)
        if rank is None:
            return initial.config.raw
        try:
            return initial.config.at_ranks(dict.fromkeys(initial.modules, rank)).raw
        except InvalidInput as error:
            raise error.for_client(client) from error

    def _seed(self, purpose: str) -> int:
        return seed_of(self._plain.seed, purpose, self.round)

    def _check_together(self, client: str, adapter: Adapter) -> None:
        together = {**self._standing.without(client), client: adapter}
        Aggregator(self.method).plan_for(
            (name, own.layout, own.config) for name, own in together.items()
        )

    def _config_of(self, client: str) -> Mapping[str, Any]:
        if client not in self._standing and self._initial is not None:
            return self._decided_config(self._initial, client)
        if client not in self._standing:
            raise InvalidInput(
                "the configuration of the adapter is missing",
                client=client,
                field="config",
                expected="the fields of adapter_config.json, from a client that was handed no adapter",
            )
        return self._standing.adapter(client).config.raw

    def _in_progress(self) -> _Round:
        if self._round is None:
            raise InvalidInput("no round is in progress", cure="Call begin() first")
        return self._round

    def _check_due(self, current: _Round, client: str) -> None:
        if client in current.heard:
            raise InvalidInput(
                f"the client was heard in round {self.round} already: its first answer counts",
                client=client,
            )
        if current.due is not None and client not in current.due:
            raise InvalidInput(f"the client takes no part in round {self.round}", client=client)

    def _failed(self, current: _Round, client: str, reason: str) -> ClientFailure:
        failure = ClientFailure(client, self.round, reason)
        current.failures.append(failure)
        self._answered(current, client)
        return failure

    def _answered(self, current: _Round, client: str) -> None:
        current.heard.add(client)
        if current.due is not None:
            current.due.discard(client)


def _largest_rank(adapter: Adapter) -> int:
    return max(slot.rank for slot in adapter.layout.slots)


def _checked_count(count: int) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InvalidInput(
            "not a number of clients", field="min_clients", expected="an integer >= 1", got=short(count)
        )
    return count
