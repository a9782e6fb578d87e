"""Writing hand-outs: the aggregate, some modules at a time, straight into the outputs' buffers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fastagg import ops
from fastagg.accumulators import Source
from fastagg.devices import pinned
from fastagg.dtypes import dtype_name
from fastagg.errors import InvalidInput
from fastagg.handouts.choices import Factored, Figures, Handout, Settings
from fastagg.handouts.delivery import Delivery
from fastagg.handouts.parcel import Parcel, split_by_target
from fastagg.handouts.sink import Sink
from fastagg.handouts.target import Target
from fastagg.peft_format.layout import TensorSpan
from fastagg.planning.budget import PeakMemory, slab_bytes, workers
from fastagg.planning.plan import PlanPart
from fastagg.planning.roster import ModuleSize
from fastagg.report import ModuleReport, Stopwatch

__all__ = ["HandoutWriter", "Progress", "module_bytes", "width_of"]

# done, total, what: modules handed out so far, of all, and the name of the last.
Progress = Callable[[int, int, str], None]


def module_bytes(
    handout: Handout,
    settings: Settings,
    m: int,
    n: int,
    rows: int,
    width: int,
    itemsize: int = 4,
) -> int:
    """Bytes that handing out one module takes, from above.

    Its slabs of so many rows, its factorisation at the rank ``width``, and an adapter of that rank.
    """
    rank = min(width, m, n) if handout.ranked else width
    work = handout.work_bytes(m, n, rows, rank, settings)
    return slab_bytes(rows, m, n, itemsize) + work + slab_bytes(width, m, n, 4)


def width_of(handout: Handout, size: ModuleSize) -> int:
    """The largest rank at which a module is handed out, if clients get their own ranks."""
    return size.width if handout.ranked else size.rank_sum


class HandoutWriter:
    """Computes the hand-out of a finished accumulator and writes it into flat buffers.

    Several threads may write at once.

    Args:
        sizes: of all modules of the round, of which the source may have a part. Every decomposition is
            as wide as the largest rank of a client in any module of that shape at least: up to that
            rank, a hand-out does not depend on which others were asked for (and above it, or together
            with such, by rounding only).
        modules: what is found out about each module is noted here.
        limit: bytes that the work on one part may take; a part has one module at least.
    """

    def __init__(
        self,
        source: Source,
        handout: Handout,
        settings: Settings,
        sizes: Mapping[str, ModuleSize],
        modules: dict[str, ModuleReport],
        watch: Stopwatch,
        peak: PeakMemory,
        limit: int,
    ) -> None:
        self.source = source
        self.handout = handout
        self.settings = settings
        self.limit = limit
        self._sizes = sizes
        self._widest: dict[tuple[int, int], int] = {}
        for size in sizes.values():
            width = max(self._widest.get((size.m, size.n), 0), width_of(handout, size))
            self._widest[size.m, size.n] = width
        self._widths = self._by_bucket(self._widest)
        self._modules = modules
        self._watch = watch
        self._peak = peak
        self._held: dict[tuple[int, int, int], Factored] = {}
        self._noting = threading.Lock()

    def parts(self, widths: Sequence[int] | None = None) -> Iterator[tuple[int, int, int]]:
        """The modules, split into what is computed at a time: (bucket, lo, hi).

        The modules of a part have one route, which each would have alone: what is handed out does
        not depend on the grouping.

        Args:
            widths: the ranks of the buckets' decompositions, the usual ones by default.
        """
        at_once = workers(self.source.device)
        for bucket, width in enumerate(self._widths if widths is None else widths):
            needs = self._module_bytes(bucket, width)
            routes = self._routes(bucket, width)
            lo = 0
            while lo < len(needs):
                hi, largest = lo, 0
                while hi < len(needs) and routes[hi] == routes[lo]:
                    largest = max(largest, needs[hi])
                    if hi > lo and (hi + 1 - lo) * largest > self.limit:
                        # Every worker gets as many modules as the others.
                        hi -= (hi - lo) % at_once if hi - lo > at_once else 0
                        break
                    hi += 1
                yield bucket, lo, hi
                lo = hi

    def workspace_bytes(self, targets: Sequence[Target] = ()) -> int:
        """Bytes that the work on one module takes at least, from above."""
        widths = self._widths_for(targets)
        return max((max(self._module_bytes(*item)) for item in enumerate(widths)), default=0)

    @property
    def held_bytes(self) -> int:
        """Bytes of the factorisations that are held."""
        return sum(held.u.nbytes + held.vt.nbytes for held in list(self._held.values()))

    def factors_bytes(self, targets: Sequence[Target] = ()) -> int:
        """Bytes of the factorisations of all modules, as :meth:`write` with ``keep`` holds them."""
        total = 0
        widths = self._widths_for(targets)
        for shape, width in zip(self.source.index.buckets, widths, strict=True):
            rank = min(width, shape.m, shape.n)
            total += len(shape.modules) * rank * (shape.m + shape.n + 1) * 4
        return total

    def _widths_for(self, targets: Sequence[Target]) -> list[int]:
        """The rank of each bucket's decomposition when these targets are written."""
        widths = dict(self._widest)
        for target in targets:
            for slot in target.layout.slots:
                if slot.module in self._sizes:
                    shape = (slot.m, slot.n)
                    widths[shape] = max(widths[shape], slot.rank)
        return self._by_bucket(widths)

    def _by_bucket(self, widths: Mapping[tuple[int, int], int]) -> list[int]:
        return [widths[bucket.m, bucket.n] for bucket in self.source.index.buckets]

    def _module_bytes(self, bucket: int, width: int) -> list[int]:
        shape = self.source.index.buckets[bucket]
        itemsize = self.source.itemsize(bucket) if self.handout.ranked else 4
        return [
            module_bytes(self.handout, self.settings, shape.m, shape.n, rows, width, itemsize)
            for rows in self.source.rows(bucket)
        ]

    def _routes(self, bucket: int, width: int) -> list[str]:
        """How each module of a bucket is computed, by its own rows alone."""
        shape = self.source.index.buckets[bucket]
        rank = min(width, shape.m, shape.n) if self.handout.ranked else width
        rows = self.source.rows(bucket)
        found = {
            count: self.handout.route(shape.m, shape.n, count, rank, self.settings)
            for count in set(rows)
        }
        return [found[count] for count in rows]

    def write(
        self,
        targets: Sequence[Target],
        sinks: Sequence[Sink],
        *,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Puts each target's tensors into its sink; those that the round lacks are left out.

        Args:
            keep: hold the factorisations of the usual width for the next call.

        Raises:
            InvalidInput: a number does not fit into its target's dtype.
        """
        index = self.source.index
        placed = [index.placed(target.layout) for target in targets]
        plans = index.plan(
            [target.layout for target in targets], [layout.scalings for layout in placed]
        )
        widths = self._widths_for(targets)
        done, delivery = 0, Delivery(self.source.device, sinks)
        for part in self.parts(widths):
            bucket, lo, hi = part
            wanted = plans[bucket].part(lo, hi)
            if len(wanted.slots):
                factored = self._factored(part, widths[bucket])
                with self._watch.stage("redistribute"):
                    delivery.settle()
                figures = self._figures(part, factored, wanted)
                if keep and widths[bucket] == self._widths[bucket]:
                    self._held[part] = factored
                shape = index.buckets[bucket]
                room = slab_bytes(widths[bucket], shape.m, shape.n, 4) * (hi - lo)
                with self._watch.stage("redistribute"):
                    for some in split_by_target(
                        wanted, shape, max(room, self._room(part, widths[bucket]))
                    ):
                        parcel = Parcel(some, shape)
                        buffer = delivery.buffer(parcel.nbytes)
                        self._redistribute(factored, parcel, buffer)
                        if not figures.largest <= parcel.safe_below:
                            self._check(buffer, parcel, targets)
                        delivery.send(parcel)
            self._peak.sample()
            done += hi - lo
            if progress is not None:
                progress(done, len(index), index.buckets[bucket].modules[hi - 1])
        with self._watch.stage("redistribute"):
            delivery.settle()
            del delivery
            self._write_whole(targets, sinks)

    def _room(self, part: tuple[int, int, int], width: int) -> int:
        """Bytes that the work on a part leaves of the limit for what is handed out."""
        bucket, lo, hi = part
        shape = self.source.index.buckets[bucket]
        needs = max(self._module_bytes(bucket, width)[lo:hi])
        return self.limit - (hi - lo) * (needs - slab_bytes(width, shape.m, shape.n, 4))

    def _redistribute(self, factored: Factored, parcel: Parcel, buffer: torch.Tensor) -> None:
        ops.redistribute_(
            [buffer],
            factored.u,
            factored.s,
            factored.vt,
            pinned(parcel.slots, buffer.device),
            pinned(parcel.scalings, buffer.device),
        )

    def _check(self, buffer: torch.Tensor, parcel: Parcel, targets: Sequence[Target]) -> None:
        nonfinite, _ = ops.scan(buffer, pinned(parcel.spans, buffer.device))
        if not bool(nonfinite.any()):
            return
        target, offset = parcel.whose(int(torch.nonzero(nonfinite)[0]))
        tensors = targets[target].layout.tensors
        span = next(span for span in tensors if span.offset == offset and span.count)
        raise _overflow(targets[target], span, int(nonfinite.sum()))

    def _factored(self, part: tuple[int, int, int], width: int) -> Factored:
        """The factorisation of a part, held or new; a GPU is not waited for."""
        bucket, lo, _ = part
        # A wider decomposition may differ in the last bits: it serves only the rank it is for.
        held = self._held.get(part) if width == self._widths[bucket] else None
        if held is not None:
            return held
        with self._timed(part):
            with self._watch.stage("stack"):
                load = self.source.load if self.handout.ranked else self.source.stacked
                chunk = load(*part)
            with self._watch.stage("svd"):
                settings = replace(self.settings, route=self._routes(bucket, width)[lo])
                return self.handout.factor(chunk, width, settings)

    def _figures(
        self, part: tuple[int, int, int], factored: Factored, wanted: PlanPart
    ) -> Figures:
        """Waits for a factorisation, refuses what is not finite, and notes what is known of it."""
        ranks = sorted(set(wanted.slots[:, 2].tolist()))
        with self._timed(part), self._watch.stage("svd"):
            figures = factored.figures(ranks)
        self._check_finite(part, figures)
        self._note(part, factored.route, figures, wanted)
        return figures

    @contextmanager
    def _timed(self, part: tuple[int, int, int]) -> Iterator[None]:
        """Counts the block's time to the part's modules."""
        started = time.perf_counter()
        yield
        entries = self._entries(part)
        seconds = (time.perf_counter() - started) / len(entries)
        with self._noting:
            for entry in entries:
                entry.seconds += seconds

    def _entries(self, part: tuple[int, int, int]) -> list[ModuleReport]:
        bucket, lo, hi = part
        return [self._modules[name] for name in self.source.index.buckets[bucket].modules[lo:hi]]

    def _check_finite(self, part: tuple[int, int, int], figures: Figures) -> None:
        for entry, norm2 in zip(self._entries(part), figures.norm2 or (), strict=False):
            if not math.isfinite(norm2):
                raise InvalidInput(
                    "the aggregate is not finite: its product leaves the range of float32",
                    module=entry.module,
                    expected="finite values",
                    cure="Leave out the clients whose factors are that large",
                )

    def _note(
        self, part: tuple[int, int, int], route: str, figures: Figures, wanted: PlanPart
    ) -> None:
        entries, norms = self._entries(part), figures.norm2
        with self._noting:
            for rank, shares in figures.kept.items():
                for place in set(wanted.slots[wanted.slots[:, 2] == rank, 0].tolist()):
                    # A new dictionary: another thread may be making a report of the old one.
                    entries[place].kept = {**entries[place].kept, rank: shares[place]}
        for place, entry in enumerate(entries):
            entry.route = route
            if norms is not None:
                entry.norm = max(norms[place], 0.0) ** 0.5
            discarded = self.source.discarded.get(entry.module, 0.0)
            entry.condensed_error = discarded / entry.norm if entry.norm else discarded
            if figures.certificate is not None:
                bound = figures.certificate[place]
                entry.certificate = bound / norms[place] if norms and norms[place] > 0 else bound
            if figures.numerical_rank is not None:
                entry.numerical_rank = int(figures.numerical_rank[place])

    def _write_whole(self, targets: Sequence[Target], sinks: Sequence[Sink]) -> None:
        holders: dict[str, list[tuple[Target, Sink, TensorSpan]]] = {}
        for target, sink in zip(targets, sinks, strict=True):
            for span in target.layout.whole:
                if span.key in self.source.whole.keys:
                    holders.setdefault(span.key, []).append((target, sink, span))
        for key, places in holders.items():
            for begin, _, values in self.source.whole.blocks(key):
                for target, sink, span in places:
                    cast = values.to(span.dtype)
                    if not bool(torch.isfinite(cast).all()):
                        raise _overflow(target, span, int((~torch.isfinite(cast)).sum()))
                    sink.put(span.offset + begin * span.dtype.itemsize, cast.view(torch.uint8))


def _overflow(target: Target, span: TensorSpan, count: int) -> InvalidInput:
    slots = target.layout.slots
    return InvalidInput(
        f"the hand-out does not fit into {dtype_name(span.dtype)}",
        client=target.clients[0] if target.clients else None,
        module=next((slot.module for slot in slots if span in (slot.a, slot.b)), None),
        field=span.key,
        expected=f"values below {torch.finfo(span.dtype).max:.3g}",
        got=f"{count} infinite or NaN",
        cure="Leave out the clients whose factors are that large, or give this one a larger lora_alpha"
        if torch.finfo(span.dtype).max > 1e38
        else "Aggregate with dtype=torch.bfloat16 or torch.float32, or give the clients a larger "
        "lora_alpha",
    )
