"""The server: rounds of clients' updates, and what each client goes on with."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastagg import Adapter, Aggregate, Aggregator, ClientUpdate
from fastagg.errors import FastAggError, InvalidInput, short
from fastagg.federated.messages import ClientFailure, Handout
from fastagg.federated.server import server_state
from fastagg.federated.server.registry import Registry
from fastagg.federated.server.server_model import Rules, ServerModel
from fastagg.federated.server.server_optimisers import FedAvg, ServerOptimiser
from fastagg.method import Method
from fastagg.rounds import state_file
from fastagg.rounds.options import check_choice, parse_device

__all__ = ["RoundOutcome", "Server", "TooFewUpdates"]


@dataclass(frozen=True, eq=False)
class RoundOutcome:
    """What became of a round.

    Attributes:
        round: its number, from 1;  attempt: how often it was tried, from 1.
        aggregate: of the round's updates; None where the round is to be repeated.
        participants: the clients whose updates are in it, sorted.
        failures: in the order in which they were noticed; a client may have several.
        seconds: the server's own work: validating, folding in, handing out.
    """

    round: int
    attempt: int
    aggregate: Aggregate | None
    participants: tuple[str, ...]
    failures: tuple[ClientFailure, ...]
    seconds: float


class TooFewUpdates(FastAggError):
    """A round that had fewer updates than the server asks for; ``outcome`` has its failures."""

    def __init__(self, outcome: RoundOutcome, needed: int) -> None:
        reasons = "; ".join(failure.reason for failure in outcome.failures)
        super().__init__(
            f"round {outcome.round}: {len(outcome.participants)} usable updates came, and "
            f"min_clients is {needed} ({reasons}). Let more clients take part, lower min_clients, "
            'or have such rounds repeated with on_too_few="repeat"'
        )
        self.outcome = outcome
        self.needed = needed


@dataclass(eq=False)
class _Round:
    """A round in progress: who takes part, whose answer is due, and what was noticed."""

    aggregator: Aggregator
    participants: frozenset[str]
    due: set[str]
    failures: list[ClientFailure] = field(default_factory=list)
    seconds: float = 0.0


class Server:
    """Federated rounds by one method. It knows adapters and updates: no model, no data, no transport.

        server = Server("flexlora", {"ann": fresh_adapter, "bob": another})
        while server.round <= 10:
            server.start_round(["ann"])
            server.receive(client.fit(server.handout("ann")))
            server.finish_round()

    Args:
        method: as :class:`fastagg.Aggregator` takes it.
        clients: name -> a fresh adapter of its own configuration. Its keys, ranks, scalings,
            configuration and dtypes are those of every adapter that the client is handed, and of
            every update that it may send (whose dtypes and keys' prefix are free). Its numbers
            matter only in modules that no client has trained yet: with B = 0 they change nothing.
        optimiser: the server's, see :mod:`fastagg.federated.server.server_optimisers`.
        min_clients: with fewer usable updates, a round does not count.
        on_too_few: what happens then: "end" raises TooFewUpdates, "repeat" returns an outcome
            without an aggregate, and the round is to be started again.
        optimiser_device: where the optimiser's dense numbers are kept, "cpu" or "cuda"; None: where
            the Aggregator works.
        options: those of :class:`fastagg.Aggregator`: max_memory, missing, accumulator, route,
            device, dtype, seed.

    Clients of one configuration share one adapter in memory. Unless the accumulator is the stack,
    the order of ``receive`` matters in the last bits: for results that repeat bit for bit, deliver
    updates in a fixed order.

    A Server is not for several threads at once.

    Raises:
        InvalidInput: an option that does not exist, or clients that do not fit together.
    """

    def __init__(
        self,
        method: str | Method,
        clients: Mapping[str, Adapter],
        *,
        optimiser: ServerOptimiser | None = None,
        min_clients: int = 1,
        on_too_few: str = "end",
        optimiser_device: str | None = None,
        **options: Any,
    ) -> None:
        plain = Aggregator(method, **options)
        self.method = plain.method
        self.optimiser = optimiser or FedAvg()
        self.on_too_few = check_choice("on_too_few", on_too_few, ("end", "repeat"))
        self._options = options
        self._clients = Registry(clients, self.method)
        self.min_clients = _checked_count(min_clients, len(self._clients))
        self._rules = Rules(
            optimiser=self.optimiser,
            merging=not self.method.handout.ranked,
            slots=self._clients.slots,
            device=parse_device(optimiser_device) if optimiser_device else plain.device,
            route=plain.route,
            seed=plain.seed,
            dtype=plain.dtype,
        )
        self._check_base_unchanged()
        self._identity = server_state.identity(self.method.name, self.optimiser, self._clients)
        self._model = ServerModel(() if self._rules.merging else self._clients.kinds)
        self._round: _Round | None = None
        self.round = 1
        self.attempt = 1

    @property
    def clients(self) -> tuple[str, ...]:
        """The names of all clients, sorted."""
        return tuple(self._clients.kind_of)

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """The participants of the round in progress that have not answered yet, sorted."""
        return tuple(sorted(self._round.due)) if self._round else ()

    def handout(self, client: str) -> Handout:
        """What a client begins the round with that is in progress or comes next.

        Every client is served, whether it took part in the last round or not, as often as it asks.
        Where clients merge, each hand-out holds the last round alone: each client has to merge that
        of every round, once (a round that is repeated hands out the same again, under its number).

        Raises:
            InvalidInput: no such client.
        """
        place = self._clients.place(client)
        if self.round == 1:
            return Handout(1)
        if self._rules.merging:
            return Handout(self.round, self._model.adapters[0], merge=True)
        shared = self._model.adapters[place]
        own = Adapter.from_flat(shared.flat, shared.layout, shared.config, name=client)
        return Handout(self.round, own)

    def start_round(self, participants: Iterable[str]) -> int:
        """Begins a round, of which these clients are asked for an update; returns its number.

        Raises:
            InvalidInput: a round is in progress, a client is not known or named twice, or they are
                fewer than ``min_clients``.
            MemoryBudgetExceeded: the round does not fit into max_memory.
        """
        if self._round is not None:
            raise InvalidInput(
                f"round {self.round} is in progress",
                field="participants",
                cure="Call finish_round() first",
            )
        named = list(participants)
        for client in named:
            self._clients.check_known(client)
        if len(set(named)) < max(self.min_clients, len(named)):
            raise InvalidInput(
                "not participants for a round",
                field="participants",
                expected=f"at least {self.min_clients} clients, each of them once",
                got=short(named),
            )
        aggregator = Aggregator(self.method, **self._options)
        aggregator.expect(self._clients.headers(sorted(named)))
        self._round = _Round(aggregator, frozenset(named), set(named))
        return self.round

    def receive(self, update: ClientUpdate) -> ClientFailure | None:
        """Takes a client's update in, all of it or nothing.

        Returns:
            None, or why the update was refused: not of the configuration that the client is
            registered with, not finite, or from a client whose answer is not due: unknown, no
            participant, or heard before. The refusal is recorded as the client's failure, and the
            round goes on.

        Raises:
            InvalidInput: no round is in progress, or not a ClientUpdate.
            MemoryBudgetExceeded: it does not fit into max_memory; the client's answer is still due.
        """
        current = self._in_progress()
        if not isinstance(update, ClientUpdate):
            raise InvalidInput(
                "not an update", expected="a ClientUpdate", got=type(update).__name__
            )
        client, started = update.client_id, time.perf_counter()
        try:
            self._check_due(client)
            self._clients.check_update(client, update.adapter)
            current.aggregator.add(update)
        except InvalidInput as error:
            failure = ClientFailure(client, self.round, str(error))
            failure.__cause__ = error
            current.failures.append(failure)
            current.due.discard(client)
            return failure
        finally:
            current.seconds += time.perf_counter() - started
        current.due.remove(client)
        return None

    def fail(self, client: str, reason: str) -> None:
        """Records that a participant has no update this round: it timed out or crashed.

        Raises:
            InvalidInput: no round is in progress, or the client's answer is not due.
        """
        current = self._in_progress()
        self._check_due(client)
        current.due.remove(client)
        current.failures.append(ClientFailure(client, self.round, reason))

    def finish_round(self) -> RoundOutcome:
        """Ends the round; participants that have not answered have failed.

        With too few updates, or after any error, the server is as it was before the round, whose
        next attempt may be started.

        Raises:
            TooFewUpdates: fewer than ``min_clients``, and ``on_too_few`` is "end".
            InvalidInput: no round is in progress, or the updates have no average, such as those
                that all have the weight 0, or it does not fit into a client's dtype.
            MemoryBudgetExceeded: a hand-out does not fit into max_memory.
        """
        current, started = self._in_progress(), time.perf_counter()
        for client in self.waiting_for:
            self.fail(client, f"client {client!r} has not answered")
        self._round = None
        number, attempt, participants = self.round, self.attempt, current.aggregator.clients
        self.attempt += 1
        aggregate = None
        if len(participants) >= self.min_clients:
            aggregate = current.aggregator.finalize()
            self._model = self._model.after(aggregate, self._rules)
            self.round, self.attempt = self.round + 1, 1
        outcome = RoundOutcome(
            number,
            attempt,
            aggregate,
            participants,
            tuple(current.failures),
            current.seconds + time.perf_counter() - started,
        )
        if aggregate is None and self.on_too_few == "end":
            raise TooFewUpdates(outcome, self.min_clients)
        return outcome

    def delta(self, module: str) -> torch.Tensor:
        """G of one module: the sum of the optimiser's changes, which continuing clients are handed
        the best approximations of; float32, in the shape of the base weight, on the CPU.

        Raises:
            InvalidInput: there is no such sum: without an optimiser it is the last aggregate's dW, where
                clients merge it is in their base weights, and before a client trains the module, zero.
        """
        if module not in self._model.totals:
            raise InvalidInput(
                "the server keeps no sum of this module's changes",
                module=module,
                cure="Take the delta of the round's aggregate, or of the adapter that is handed out",
            )
        slot, total = self._clients.slots[module], self._model.totals[module]
        return (total.t() if slot.transposed else total).reshape(slot.weight_shape).cpu()

    def state_dict(self) -> dict[str, torch.Tensor | str]:
        """The server after the last complete round: tensors on the CPU and one JSON text.

        What a round in progress has received is not in it.
        """
        return server_state.dump(self._model, self.round, self._identity)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave: what follows has the bits that it would have had.

        A round in progress is forgotten.

        Raises:
            InvalidInput: not such a state, a damaged one, or one of another method, optimiser or
                other clients; nothing is changed then.
        """
        loaded = server_state.load(state, self._identity, self._clients, self._rules)
        self._model, self.round = loaded
        self._round, self.attempt = None, 1

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes :meth:`state_dict` as one safetensors file: whole, or not at all; what was there is
        replaced."""
        state_file.write(file, self.state_dict())

    def load(self, file: str | os.PathLike[str]) -> None:
        """Goes on from what :meth:`save` wrote; see :meth:`load_state_dict`.

        Raises:
            InvalidInput: no such file, or not such a state; nothing is changed then.
        """
        self.load_state_dict(state_file.read(file))

    def __repr__(self) -> str:
        return (
            f"Server({self.method.name}, {type(self.optimiser).__name__}, "
            f"{len(self._clients)} clients, round {self.round})"
        )

    def _in_progress(self) -> _Round:
        if self._round is None:
            raise InvalidInput("no round is in progress", cure="Call start_round(participants) first")
        return self._round

    def _check_due(self, client: str) -> None:
        current = self._in_progress()
        self._clients.check_known(client)
        if client not in current.participants:
            raise InvalidInput(f"the client takes no part in round {self.round}", client=client)
        if client not in current.due:
            raise InvalidInput(
                f"the client was heard in round {self.round} already: its first answer counts",
                client=client,
            )

    def _check_base_unchanged(self) -> None:
        """An optimiser's first pseudo-gradient is dW - 0: the adapters have to begin at zero."""
        for adapter in self._clients.kinds if self.optimiser.dense else ():
            if adapter.config.changes_base is not None:
                raise InvalidInput(
                    "a server optimiser needs adapters that begin at zero, and the initialisation "
                    "moves a part of the base weights into them",
                    field="init_lora_weights",
                    got=adapter.config.changes_base,
                    cure="Use the default initialisation, or no optimiser",
                )


def _checked_count(count: int, most: int) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= most:
        raise InvalidInput(
            "not a number of clients",
            field="min_clients",
            expected=f"an integer from 1 to {most}, as many as the server knows",
            got=short(count),
        )
    return count
