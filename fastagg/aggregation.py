"""The result of a round, handed out lazily: adapters, the stack, dW, merged weights, folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastagg.accumulators import Source
from fastagg.adapter import Adapter
from fastagg.distributed.share import Share
from fastagg.errors import InvalidInput
from fastagg.handouts.choices import ClientStack, Handout, Settings
from fastagg.handouts.folder import CLIENTS_NAME, REPORT_NAME, shared_folder
from fastagg.handouts.sink import MemorySink
from fastagg.handouts.target import (
    Target,
    check_ranks,
    for_client,
    for_rank,
    for_stack,
    targets_for,
)
from fastagg.handouts.writer import HandoutWriter, Progress
from fastagg.method import Method
from fastagg.peft_format.layout import Slot, TensorSpan
from fastagg.peft_format.safetensors_file import view
from fastagg.planning.budget import PeakMemory, require, work_bytes
from fastagg.report import ModuleReport, Report, SkippedClient, Stopwatch
from fastagg.rounds.log import RoundLog, module_reports

if TYPE_CHECKING:
    from fastagg.checkpoint import Change

__all__ = ["Aggregate", "HandoutOptions"]


@dataclass(frozen=True)
class HandoutOptions:
    """What an Aggregator passes on to its Aggregate; see there."""

    missing: str
    settings: Settings
    dtype: torch.dtype | None
    max_memory: int | None


class Aggregate:
    """What a round of clients adds up to; made by :meth:`fastagg.Aggregator.finalize`.

    Everything is computed when it is asked for, some modules at a time; several threads may ask at
    once. ``dW`` is the method's own
    aggregate: the exact sum_k p_k s_k B_k A_k for flora and flexlora, the product of the averaged
    factors for fedit, zeropad and hetlora.

    Of an Aggregator with a process group, every process asks for the same in the same order, from one
    thread; each computes its own modules, and all get the whole answer. ``add_delta``, ``merge_into``
    and ``change`` need all modules in one process, and refuse.
    """

    def __init__(
        self,
        source: Source,
        share: Share,
        method: Method,
        options: HandoutOptions,
        watch: Stopwatch,
        peak: PeakMemory,
    ) -> None:
        self.method = method
        self._source = source
        self._share = share
        self._roster = roster = share.whole
        self._options = options
        self._log = RoundLog(roster, watch, peak)
        self._writer = self._new_writer(method.handout, self._log.modules)

    @property
    def clients(self) -> tuple[str, ...]:
        """The ids of the clients, sorted."""
        return tuple(self._log.clients)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules, sorted."""
        return tuple(sorted(self._log.modules))

    @property
    def skipped(self) -> list[SkippedClient]:
        """Clients that were left out before, for the report."""
        return self._log.skipped

    @skipped.setter
    def skipped(self, clients: list[SkippedClient]) -> None:
        self._log.skipped = clients

    @property
    def base_effect(self) -> str:
        """What the method's hand-out does to the base weights, in a sentence."""
        return self.method.handout.base_effect

    def adapter(
        self,
        rank: int | None = None,
        *,
        client: str | None = None,
        like: Adapter | None = None,
    ) -> Adapter:
        """What a client is handed.

        Args:
            rank: an adapter of this rank for all modules, its scaling the clients' where they
                agree on it and else 1.
            client: the adapter of this client: its own keys, ranks, scalings, configuration and
                dtypes. For flora, whose clients all get the stack, that is :meth:`stacked`.
            like: the adapter of anyone, member of the round or not, brought up to date: its own
                keys, ranks, scalings, configuration and dtypes, and its own numbers still in the
                modules and whole tensors that no client of the round has. For flora as above.

        The decomposition is computed at the first call, for the largest rank of all clients, and
        kept: later calls only write their adapter.

        Raises:
            InvalidInput: not exactly one of them is given, no such client, a rank that the method
                does not hand out, or an adapter that does not fit to the clients'.
            MemoryBudgetExceeded: the adapter does not fit into max_memory.
        """
        choices = {"rank": rank, "client": client, "like": like}
        given = [name for name, value in choices.items() if value is not None]
        if len(given) != 1:
            raise InvalidInput(
                "which adapter?",
                field=", ".join(given or choices),
                expected="either a rank, a client or an adapter",
                got=" and ".join(given) or "none of them",
            )
        if rank is not None:
            (rank,) = check_ranks([rank])
            self.method.handout.check_rank(rank, self._log.largest_rank)
            return self._in_memory(self._writer, for_rank(self._roster, rank, self._options.dtype))
        if like is not None:
            return self._brought_up_to_date(like)
        member = self._roster.members.get(client or "")
        if member is None:
            raise InvalidInput(
                "no such client in this round",
                client=str(client),
                expected=f"one of {len(self.clients)}: {', '.join(self.clients[:5])}",
            )
        if not self.method.handout.ranked:
            return self.stacked()
        return self._in_memory(
            self._writer, for_client(member.client, member.layout, member.config, self._options.dtype)
        )

    def stacked(self) -> Adapter:
        """FLoRA's stack of all clients as one adapter of rank sum r_k and scaling 1: exactly dW.

        The shares and scalings are multiplied into A, so the dtype is float32 unless the Aggregator
        was given one: in bfloat16 the products would be rounded.

        Raises:
            InvalidInput: the accumulator did not keep the factors.
            MemoryBudgetExceeded: the stack does not fit into max_memory.
        """
        writer = self._writer
        if self.method.handout.ranked:
            # The report speaks of the method's own hand-out: this one goes unreported.
            writer = self._new_writer(ClientStack(), module_reports(self._roster))
        return self._in_memory(writer, for_stack(self._roster, self._options.dtype))

    def delta(self, module: str) -> torch.Tensor:
        """dW of one module: float32, in the shape of the base weight, on the CPU.

        Raises:
            InvalidInput: no such module.
        """
        slot = self._slot(module)
        matrix = torch.zeros(slot.m, slot.n, dtype=torch.float32, device=self._source.device)
        with self._share.agreeing():
            if self._share.has(module):
                self._add_delta(module, matrix, transposed=False)
        self._share.complete(matrix)
        return (matrix.t() if slot.transposed else matrix).reshape(slot.weight_shape).cpu()

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """dW = B A of one module in the factors that were kept, without forming it.

        Returns:
            A (R, n) and B (m, R), float64, on the CPU: the clients' stack with p_k s_k multiplied
            into A (of clients that were condensed, what is kept), or the averaged factors with
            their scalings in B. In float32 p_k s_k A_k would be rounded once more than dW is, and
            could overflow where dW does not. None where the accumulator, which memory may have
            chosen, kept dW alone: see :meth:`delta`.

        Raises:
            InvalidInput: no such module.

        O(R (m + n)) time and memory.
        """
        self._slot(module)
        found = None
        with self._share.agreeing():
            if self._share.has(module):
                found = self._factors(module)
        return next((each for each in self._share.gather(found) if each is not None), None)

    def _factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        bucket, place = self._source.index.where(module)
        chunk = self._source.load(bucket, place, place + 1)
        if chunk.dense is not None:
            return None
        a, b = chunk.exact_factors(0)
        return a.cpu(), b.cpu()

    def condensed_error(self, module: str) -> float:
        """Upper bound of what :meth:`fastagg.Aggregator.condense` cost a module.

        |dW of the clients' own adapters - dW|_F / |dW|_F, the numerator alone where dW is 0; 0 where no
        client was condensed. The error of a hand-out beside the clients' own dW is at most this and its
        error beside dW. O(R^2 (m + n)) time.

        Raises:
            InvalidInput: no such module.
        """
        self._slot(module)
        discarded = self._source.discarded.get(module, 0.0)
        if not discarded:
            return 0.0
        bucket, place = self._source.index.where(module)
        return discarded / (self._source.load(bucket, place, place + 1).norm(0) or 1.0)

    def add_delta(self, module: str, matrix: torch.Tensor, *, transposed: bool = False) -> None:
        """Adds dW of one module into an (m, n) matrix in place, or dW^T into an (n, m) one.

        The matrix may be float32, bfloat16, float16 or float64, on any device, where the work is
        done; the sum is rounded once.

        Raises:
            InvalidInput: no such module.
        """
        self._slot(module)
        self._share.check_alone("add_delta")
        self._add_delta(module, matrix, transposed=transposed)

    def _add_delta(self, module: str, matrix: torch.Tensor, *, transposed: bool) -> None:
        bucket, place = self._source.index.where(module)
        chunk = self._source.load(bucket, place, place + 1)
        with torch.no_grad():
            chunk.add_to(0, matrix, transposed=transposed)

    def merge_into(self, base: torch.nn.Module | Mapping[str, torch.Tensor]) -> None:
        """W += dW in place, for every module; whole tensors (modules_to_save) are replaced.

        Args:
            base: a model, plain or wrapped by PEFT, or its weights by parameter name.

        Weights of float32, bfloat16, float16 and float64, on any device, where the work is done;
        sums are taken in float32 or better and rounded once. All shapes are checked before any
        weight is changed.

        Raises:
            InvalidInput: a module that the base lacks, another shape, a quantised weight, or
                adapters whose initialisation moved a part of the base weights into them.
        """
        from fastagg.rounds.base_weights import add_to_base

        self._check_base_unchanged()
        self._share.check_alone("merge_into")
        slots = [slot for slot, _ in self._roster.slots.values()]
        whole = [span for span, _ in self._roster.whole.values()]
        add_to_base(base, self._writer, slots, whole)

    def change(self) -> Change:
        """What :func:`fastagg.checkpoint.merge_into_checkpoint` takes: deltas read as they merge."""
        from fastagg.rounds.base_weights import as_change

        self._check_base_unchanged()
        self._share.check_alone("change")
        slots = [slot for slot, _ in self._roster.slots.values()]
        whole = [span for span, _ in self._roster.whole.values()]
        return as_change(self.method.name, self.add_delta, slots, self._source.whole, whole)

    def save(
        self,
        folder: str | os.PathLike[str],
        ranks: Iterable[int] | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Writes the hand-outs as folders that PEFT loads: all of it, or nothing.

        ``rank-16/`` and the like, one for each distinct set of ranks, scalings, dtypes and modules
        among the clients (flora: ``stacked/``); ``clients.json`` maps client to folder;
        ``report.json`` is the report. The memory needed is that of some modules at a time, whatever
        the number of modules and of clients.

        Args:
            ranks: hand out these ranks instead of the clients' own; each client gets the largest
                that is not above its own largest, else the smallest.
            force: replace the folder where it exists.
            progress: called with modules done, modules in all, and the last module's name.

        Raises:
            InvalidInput: the folder exists, or ranks that the method does not hand out.
            MemoryBudgetExceeded: not even one module fits into max_memory beside the accumulator.
        """
        targets = targets_for(
            self._roster, self.method.handout, ranks, self._options.dtype
        )
        with self._share.agreeing():
            require(
                self._source.nbytes + self._writer.held_bytes + self._writer.workspace_bytes(targets),
                self._options.max_memory,
                "handing out one batch of modules",
                "Raise max_memory",
            )
        with ExitStack() as opened:
            with self._log.watch.stage("write"):
                out = opened.enter_context(shared_folder(folder, targets, self._share, force=force))
            with self._share.agreeing():
                self._writer.write(targets, out.sinks, progress=progress)
            with self._log.watch.stage("write"):
                out.commit()
                places = {client: target.name for target in targets for client in target.clients}
                out.write_json(CLIENTS_NAME, {client: places[client] for client in self.clients})
            self._log.wrote(targets, out.bytes_written)
            self._log.join(self._share)
            out.write_json(REPORT_NAME, self.report.to_dict())

    @property
    def report(self) -> Report:
        """What was done so far; figures of the hand-outs are there once something was handed out."""
        return self._log.report(
            self.method.name, self._source.kind, self._options.missing, self.base_effect
        )

    def __repr__(self) -> str:
        return (
            f"Aggregate({self.method.name}, {len(self.clients)} clients, "
            f"{len(self.modules)} modules, {self._source.kind})"
        )

    def _slot(self, module: str) -> Slot:
        if module not in self._roster.slots:
            raise InvalidInput(
                "no client has this module",
                module=module,
                expected=f"one of {len(self.modules)}, such as {self.modules[0]}",
            )
        return self._roster.slots[module][0]

    def _new_writer(self, handout: Handout, modules: dict[str, ModuleReport]) -> HandoutWriter:
        limit = work_bytes(self._source.device)
        if self._options.max_memory is not None:
            limit = max(1, min(limit, self._options.max_memory - self._source.nbytes))
        return HandoutWriter(
            self._source,
            handout,
            self._options.settings,
            self._roster.sizes,
            modules,
            self._log.watch,
            self._log.peak,
            limit,
        )

    def _brought_up_to_date(self, adapter: Adapter) -> Adapter:
        name = adapter.name or "adapter"
        self._roster.check_fit(name, adapter.layout, adapter.config)
        if not self.method.handout.ranked:
            return self.stacked()
        target = for_client(name, adapter.layout, adapter.config, self._options.dtype)
        return self._in_memory(self._writer, target, adapter.state_dict())

    def _in_memory(
        self, writer: HandoutWriter, target: Target, before: Mapping[str, torch.Tensor] | None = None
    ) -> Adapter:
        """A target's adapter; ``before`` has its tensors by source, where the round may lack some."""
        held = self._source.nbytes + target.layout.nbytes
        needed = held + writer.workspace_bytes([target])
        with_factors = needed + writer.factors_bytes([target])
        with self._share.agreeing():
            require(
                needed,
                self._options.max_memory,
                f"the adapter {target.name!r} in memory",
                "Raise max_memory, or write it with .save(folder), which streams",
            )
        budget = self._options.max_memory
        keep = writer.handout.ranked and (budget is None or with_factors <= budget)
        sink = MemorySink(target.layout.nbytes)
        with self._share.agreeing():
            writer.write([target], [sink], keep=keep)
        self._share.complete(sink.flat)
        self._log.join(self._share)
        if before is not None:
            for span in self._lacking(target):
                view(sink.flat, span).copy_(before[span.source])
        return Adapter.from_flat(sink.flat, target.layout, target.config, name=target.name)

    def _lacking(self, target: Target) -> Iterator[TensorSpan]:
        """The tensors of a target that no client of the round has."""
        for slot in target.layout.slots:
            if slot.module not in self._roster.slots:
                yield from (slot.a, slot.b)
        yield from (span for span in target.layout.whole if span.key not in self._roster.whole)

    def _check_base_unchanged(self) -> None:
        changed = self._roster.changes_base
        if changed is not None:
            raise InvalidInput(
                "the initialisation moved a part of the base weights into the adapters, which the "
                "base model still has",
                field="init_lora_weights",
                got=changed,
                cure="Convert the adapters to plain LoRA first: "
                "save_pretrained(path_initial_model_for_weight_conversion=...)",
            )
