"""Streaming aggregation: clients are folded in one by one, all of each or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastagg import methods
from fastagg.accumulators import Accumulator, DenseAccumulator, MeanAccumulator, StackAccumulator, join
from fastagg.adapter import Adapter
from fastagg.aggregation import Aggregate, HandoutOptions
from fastagg.byte_sizes import parse_bytes
from fastagg.distributed import group_of
from fastagg.distributed.share import Share, ShareOfModules
from fastagg.errors import FastAggError, InvalidInput
from fastagg.handouts.choices import Settings
from fastagg.linalg import ROUTES
from fastagg.method import Method
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import Layout
from fastagg.planning.budget import PeakMemory
from fastagg.planning.roster import Member, Roster
from fastagg.report import Stopwatch
from fastagg.rounds.memory_plan import MemoryPlan
from fastagg.rounds.options import check_choice, parse_device, parse_dtype, parse_seed
from fastagg.update import ClientUpdate

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["Aggregator"]


class Aggregator:
    """Folds clients' adapters into an accumulator, and hands the aggregate over at the end.

    Args:
        method: the name of a published method, one of :func:`fastagg.methods.names`, or a Method.
        max_memory: what accumulator and workspace may take on the device: bytes, or a text such as
            "8GiB". On a GPU, sums have two clients under way to them beside; as much pinned memory
            of the host is not counted.
        missing: what a module counts for that a client lacks: "renormalise" divides by the weights
            of the clients that have it, "zero" counts the others with an update of zero.
        accumulator: "stack" keeps the adapters: bits do not depend on the order of arrival, memory
            grows with the clients. "dense" keeps dW: m n float32 for each module whatever the
            number of clients; the order of arrival matters in the last bits. "auto" begins with
            the stack and changes to dense once that is smaller, or while max_memory still lets it.
        route: how dW is decomposed: "gram", "qr", "randomized", "dense" or "auto".
        device: "cpu", "cuda", or "auto": cuda where a GPU and the CUDA kernels are there. The work
            goes to the current stream; adapters, states and deltas come back on the CPU.
        dtype: of what is handed out; None is each client's own.
        seed: of the randomized decomposition.
        process_group: of torch.distributed, whose processes share the modules out among them by what
            they cost: each reads, holds and computes its own alone, and max_memory is each one's. All
            must make the same calls with the same updates in the same order; what one refuses, all
            refuse. The bits are those of one process. Where the *clients* are on different machines,
            see :meth:`combine`.

    An Aggregator is not for several threads at once; aggregators of several threads or processes
    are joined by :meth:`merge`.

    Raises:
        InvalidInput: an option that does not exist or that the method cannot be run with.
        RankLost: from any method that has to wait for the other processes: one does not come.
    """

    _accumulator: Accumulator
    _interrupted: str | None
    _peak: PeakMemory
    _plan: MemoryPlan
    _roster: Roster
    _share: Share
    _watch: Stopwatch

    def __init__(
        self,
        method: str | Method = "flexlora",
        *,
        max_memory: int | str | None = None,
        missing: str = "renormalise",
        accumulator: str = "auto",
        route: str = "auto",
        device: str = "auto",
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.method = methods.get(method)
        self.missing = check_choice("missing", missing, ("renormalise", "zero"))
        self.accumulator = check_choice("accumulator", accumulator, ("auto", "stack", "dense"))
        self.route = check_choice("route", route, ROUTES)
        self.device = parse_device(device)
        self.dtype = parse_dtype(dtype)
        self.max_memory = parse_bytes(max_memory)
        self.seed = parse_seed(seed)
        self.method.check_accumulator(self.accumulator)
        self._group = None if process_group is None else group_of(process_group)
        self._reset()

    @property
    def clients(self) -> tuple[str, ...]:
        """The ids of the clients folded in, sorted."""
        return tuple(sorted(self._roster.members))

    @property
    def memory(self) -> int:
        """Bytes that the accumulator holds."""
        return self._accumulator.nbytes

    @property
    def accumulator_kind(self) -> str:
        """The accumulator in use: "stack", "dense" or "means"."""
        return self._accumulator.kind

    def add(self, update: ClientUpdate | str | os.PathLike[str]) -> None:
        """Validates a client's whole update, then folds it in: all of it or nothing.

        Args:
            update: the update, or an adapter folder, which counts 1 under the folder's name.

        Raises:
            InvalidInput: the update, or that it does not fit to those of the other clients.
            MemoryBudgetExceeded: it does not fit into max_memory; the error says what would.
        """
        self._check_usable()
        with self._share.growing() as same:
            with self._watch.stage("read"):
                update = ClientUpdate.of(update)
            adapter, client, weight = update.adapter, update.client_id, update.weight
            layout = adapter.layout
            same += [client, weight, layout.digest]
            with self._watch.stage("validate"):
                self._roster.check(client, layout, adapter.config)
                self._share.grow([layout])
                own = self._share.update(update)
                own.validate()
                judged = own.adapter if self.method.weights.of_numbers else adapter
                weights = self.method.weights.slot_weights(
                    client, weight, judged.layout, judged.flat
                )
        if self.method.weights.of_numbers:
            weights = self._share.weights(layout, weights)
        absent = self.method.weights.absent_weight(weight)
        member = Member(client, weight, layout, adapter.config, weights, absent)
        with self._watch.stage("fold"):
            self._make_room([member.layout])
            self._changing(self._change_by(self._share.member(member), own.adapter), [member])
        self._peak.sample()

    def plan_for(self, clients: Iterable[tuple[str, Layout, AdapterConfig]]) -> tuple[str, int]:
        """What a round of these clients would need, by their headers; nothing is changed.

        Args:
            clients: (client id, layout, config) of each.

        Returns:
            The accumulator, "stack", "dense" or "means", and the bytes that it and the work beside
            it take.

        Raises:
            InvalidInput: the clients do not fit together.
            MemoryBudgetExceeded: the round does not fit into max_memory.
        """
        return self._plan.choose(self._new_share(self._new_roster().with_headers(clients)))

    def expect(self, clients: Iterable[tuple[str, Layout, AdapterConfig]]) -> None:
        """Settles the accumulator for a round whose clients are all known, before the first.

        Raises:
            InvalidInput: the clients do not fit together, or some were added already.
            MemoryBudgetExceeded: the round does not fit into max_memory.
        """
        if self._roster.members:
            raise InvalidInput(
                "the round has begun",
                expected="an aggregator without clients",
                got=f"{len(self._roster)} clients",
            )
        with self._share.agreeing() as same:
            known = list(clients)
            roster = self._new_roster().with_headers(known)
            same += [(client, layout.digest) for client, layout, _ in known]
        expected = self._new_share(roster)
        kind, _ = self._plan.choose(expected)
        self._reset(kind, expected.emptied(self._new_roster()))
        if isinstance(self._accumulator, MeanAccumulator):
            self._accumulator.reserve(expected.own.sizes)

    def merge(self, other: Aggregator) -> None:
        """Adds all clients of another aggregator, which stays as it is: a tree of servers.

        Raises:
            InvalidInput: another method or other options, a client that both have, or clients that
                do not fit together; nothing is changed then.
            MemoryBudgetExceeded: both together do not fit into max_memory.
        """
        self._check_usable()
        for each in (self, other):
            each._share.check_alone("merge")
        other._check_usable()
        other._check_sums()
        self._check_like(other)
        members = other._roster.sorted()
        for member in members:
            self._roster.check(member.client, member.layout, member.config)
        if not members:
            return
        with self._watch.stage("fold"):
            self._make_room(other._held_layouts(), other._accumulator)
            self._changing(lambda: join(self._accumulator, other._accumulator, members), members)
            self._count_held()
        self._peak.sample()

    def combine(self, process_group: dist.ProcessGroup) -> Aggregator:
        """Joins the clients that came to different processes, each of which calls this with its own.

        Headers go to all, factors and sums only to the process that has their modules: what that takes
        is the own clients, which stay here as they are, and the own modules.

        Returns:
            An aggregator of all clients whose modules are shared out among the processes, as with
            ``process_group``. Stacks are joined bit for bit; sums are added by reduce_scatter, in no
            promised order.

        Raises:
            InvalidInput: on all processes: other options, a client that two of them have, or clients
                that do not fit together.
            MemoryBudgetExceeded: a process's share does not fit into its max_memory.
            RankLost: a process did not come.
        """
        from fastagg.distributed.exchange import bring

        group = group_of(process_group)
        with group.agreeing() as same:
            self._check_usable()
            self._share.check_alone("combine")
            self._check_sums()
            self._check_own_factors()
            same += [self.method.name, self.missing, self.accumulator, self.route, self.dtype, self.seed]
        result = Aggregator(
            self.method,
            max_memory=self.max_memory,
            missing=self.missing,
            accumulator=self.accumulator,
            route=self.route,
            device=str(self.device),
            dtype=self.dtype,
            seed=self.seed,
            process_group=process_group,
        )
        held = group.gather((self._accumulator.kind, list(self._roster.members.values())))
        roster = self._new_roster()
        for member in [member for _, members in held for member in members]:
            roster.check(member.client, member.layout, member.config)
            roster.admit(member)
        summed = any(members and kind == "dense" for kind, members in held)
        plan = replace(result._plan, mode="dense" if summed else self.accumulator)
        share = ShareOfModules(group, roster)
        result._reset(plan.choose(share)[0], share)
        bring(share, held, self._accumulator, result._accumulator)
        result._plan = replace(result._plan, settled=None)  # more clients may be added
        return result

    def condense(self, rank: int) -> None:
        """Gives the clients' adapters up for the best approximation of their weighted sum of this rank.

        For the inner nodes of a tree of servers: add or :meth:`merge`, condense, send the
        :meth:`state_dict` up. What is held is one float32 adapter, whatever the number of clients; who
        took part is kept, so that the round goes on as before: other clients' weights, more clients,
        another condensing, each client's own hand-out. Whole tensors (modules_to_save) are averaged as
        ever. In a module of m x n whose clients' ranks add up to R, min(rank, R, m, n) is kept: to
        rounding (a few 1e-7 |dW|) nothing is lost where that is R, m or n. Where R is not above the rank
        in any module, and no two clients share a whole tensor, nothing is changed at all.

        The error of each module, |weighted average - what is kept|_F, is measured. The errors of all
        levels add up to a bound (the triangle inequality), which stays with the state and is told by
        :meth:`Aggregate.condensed_error` and the report. A hand-out of rank r is as good as a kept
        rank leaves it: take 2r at least, r being the largest of the clients, and a tree that is wide
        and shallow.

        Args:
            rank: from 1; what is kept of each module.

        Raises:
            InvalidInput: not a rank; a method that hands out factors (flora) or their means, or the
                accumulator "dense", asked for by name; nothing is changed then.
            MemoryBudgetExceeded: the work beside the accumulator does not fit; nothing is changed then.
        """
        from fastagg.rounds.condensing import condensed

        self._check_usable()
        self._share.check_alone("condense")
        self._check_sums()
        self._accumulator = condensed(
            self._roster, self._accumulator, rank, self._plan, self._watch, self._peak
        )
        self._count_held()

    def finalize(self) -> Aggregate:
        """Hands the round over; the aggregator is empty then and ready for the next.

        Raises:
            InvalidInput: no client was added, or the weights leave a module without an average; the
                aggregator keeps its clients then.
        """
        self._check_usable()
        if not self._roster.members:
            raise InvalidInput(
                "there is nothing to aggregate",
                expected="at least one client",
                got="none",
                cure="Add a client's update first",
            )
        options = HandoutOptions(
            self.missing, self._plan.settings, self.dtype, self.max_memory
        )
        sums = self._accumulator
        self._share.check_weights(self.missing)
        try:
            with self._watch.stage("fold"), self._share.agreeing():
                source = sums.finish(self._share.own, self.missing)
            result = Aggregate(source, self._share, self.method, options, self._watch, self._peak)
        except BaseException as error:
            if isinstance(sums, DenseAccumulator) and sums.divided:
                self._interrupted = type(error).__name__
            raise
        self._reset()
        return result

    def state_dict(self) -> dict[str, torch.Tensor | str]:
        """Everything that the round holds so far, to be saved by torch.save or safetensors.

        A flat dictionary of tensors and one JSON text. Sums are copied, since later clients change
        them; the clients' buffers, which never change, are not.
        """
        from fastagg.rounds.state import dump

        self._check_usable()
        self._share.check_alone("state_dict")
        self._check_sums()
        return dump(self.method.name, self.missing, self._roster, self._accumulator)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a round that was saved: what follows has the bits that it would have had.

        Raises:
            InvalidInput: not such a state, a damaged one, or one of another method, another
                ``missing``, or an accumulator that the options exclude; nothing is changed then.
            MemoryBudgetExceeded: it does not fit into max_memory; nothing is changed then.
        """
        from fastagg.rounds.state import load

        self._share.check_alone("load_state_dict")
        roster = self._new_roster()
        accumulator = load(
            state,
            MemoryPlan(self.method, self._plan.settings, self.max_memory, self.accumulator),
            self.missing,
            roster,
            self.device,
        )
        self._reset(share=self._new_share(roster), accumulator=accumulator)
        self._count_held()

    def __repr__(self) -> str:
        return (
            f"Aggregator({self.method.name}, {len(self._roster)} clients, "
            f"{self._accumulator.kind}, {self.memory} bytes)"
        )

    def _reset(
        self,
        settled: str | None = None,
        share: Share | None = None,
        accumulator: Accumulator | None = None,
    ) -> None:
        """Begins a round: an empty one, or one that has a roster, of which something was saved."""
        self._interrupted = "a round was about to begin"
        settings = Settings(self.route, self.seed, self.device)
        self._plan = MemoryPlan(
            self.method, settings, self.max_memory, self.accumulator, settled
        )
        self._share = share or self._new_share(self._new_roster())
        self._roster = self._share.whole
        self._accumulator = accumulator or self._empty()
        self._watch = Stopwatch()
        self._peak = PeakMemory(self.device)
        self._interrupted = None

    def _new_roster(self) -> Roster:
        return Roster(equal_ranks=self.method.equal_ranks, method=self.method.name)

    def _new_share(self, roster: Roster) -> Share:
        return Share(roster) if self._group is None else ShareOfModules(self._group, roster)

    def _empty(self) -> Accumulator:
        if self._plan.first == "means":
            return MeanAccumulator(self.device, self.missing, self._plan.fold_limit)
        if self._plan.first == "dense":
            return self._empty_dense()
        return StackAccumulator(self.device)

    def _empty_dense(self) -> DenseAccumulator:
        return DenseAccumulator(self.device, self.missing, self._plan.fold_limit)

    def _held_layouts(self) -> list[Layout]:
        members = self._roster.sorted()
        if isinstance(self._accumulator, StackAccumulator):
            return self._accumulator.layouts(members)
        return [member.layout for member in members]

    def _count_held(self) -> None:
        if isinstance(self._accumulator, StackAccumulator) and self._accumulator.condensed:
            self._roster.hold(self._held_layouts())

    def _make_room(self, layouts: Sequence[Layout], joined: Accumulator | None = None) -> None:
        if self._plan.turns_dense(self._share, self._accumulator, layouts, joined):
            assert isinstance(self._accumulator, StackAccumulator)
            dense = self._empty_dense()
            dense.take(self._accumulator, self._share.own.sorted())
            self._accumulator = dense

    def _change_by(self, member: Member, adapter: Adapter) -> Callable[[], None]:
        """What takes a client's numbers in.

        Raises:
            InvalidInput: the file was rewritten before its copy, the only one that a GPU sees, was made.
        """
        accumulator = self._accumulator
        if isinstance(accumulator, StackAccumulator):

            def copy() -> None:
                accumulator.add([member], [adapter.flat])
                adapter.check_unchanged(member.client)

            return copy
        flat = accumulator.staging.bring(adapter.flat)
        adapter.check_unchanged(member.client)
        return lambda: accumulator.add([member], [flat])

    def _changing(self, change: Callable[[], None], members: Sequence[Member]) -> None:
        """Changes the accumulator and admits the members; once begun, that must not stop half way.

        A stack is changed whole or not at all, so only the admission matters there.
        """
        admitting = False
        try:
            with self._share.agreeing():
                change()
            admitting = True
            for member in members:
                self._roster.admit(member)
                self._share.admit(member)
        except BaseException as error:
            if admitting or not isinstance(self._accumulator, StackAccumulator):
                self._interrupted = type(error).__name__
            else:
                self._accumulator.discard(members)
            raise

    def _check_usable(self) -> None:
        if self._interrupted is not None:
            raise FastAggError(
                f"a change of the round was interrupted ({self._interrupted}): what was added up is "
                "worth nothing now. Load a saved state, or start the round again"
            )

    def _check_sums(self) -> None:
        if not isinstance(self._accumulator, StackAccumulator):
            self._accumulator.blocks.check_finite()

    def _check_own_factors(self) -> None:
        held = self._accumulator
        condensed = isinstance(held, StackAccumulator) and held.condensed
        if condensed or (isinstance(held, DenseAccumulator) and held.discarded):
            raise InvalidInput(
                "the adapters of some clients were condensed, and cannot be parted by modules any more",
                field="condense",
                cure="Merge the states of such aggregators, or combine before anything is condensed",
            )

    def _check_like(self, other: Aggregator) -> None:
        for field in ("method", "missing", "accumulator", "route", "dtype", "seed"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise InvalidInput(
                    "only aggregators with the same options can be merged",
                    field=field,
                    expected=getattr(mine, "name", mine),
                    got=getattr(theirs, "name", theirs),
                )
