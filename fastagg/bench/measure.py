"""How an operation is measured in a case.

Two runs, each with fresh inputs in fresh memory; in a run the contenders take turns, so that a drift of
the machine's speed meets all alike, in an order that turns around from turn to turn. How far the medians
of the two runs lie apart is the noise: a difference within it is not called one. What is too slow to be
timed on all modules is timed on fewer and scaled by the counted work, and marked; what would be too slow
for a single module is left out, and named.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fastagg.bench.cases import Case
from fastagg.bench.clock import Clock
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.memory import available_bytes
from fastagg.bench.record import LeftOut, Row
from fastagg.bench.workload import FactorKind, Workload, draw

__all__ = ["EFFORTS", "Effort", "Measurement", "measure"]

_RUNS = 2
_LEAST_TURNS = 3
_RUNS_OF_A_TURN = 2  # one to size a block, and a block

_Part = Callable[[Workload], Workload]


@dataclass(frozen=True)
class Effort:
    """How much time a measurement may take."""

    turns: int
    """Of each contender in each of two runs."""
    turn_seconds: float
    """Short runs are repeated for so long in a turn."""
    contender_seconds: float
    """What all turns of a contender may take; slower ones are timed on fewer modules."""
    patience: float
    """Seconds of one module beyond which a contender is left out, predicted from its counted work."""
    held_bytes: int
    """What inputs and results may take: fewer layers are drawn beyond it."""
    compile: bool
    """Whether the best baseline is tried through torch.compile, too."""


EFFORTS = {
    "quick": Effort(3, 0.005, 1.0, 2.0, 256 << 20, compile=False),
    "standard": Effort(5, 0.02, 12.0, 60.0, 3 << 30, compile=True),
    "full": Effort(10, 0.05, 60.0, 600.0, 6 << 30, compile=True),
}


@dataclass
class Measurement:
    """The rows of one operation in one case."""

    rows: list[Row]
    left_out: list[LeftOut]


@dataclass
class _Entry:
    """A contender in the middle of being measured."""

    contender: Contender
    part: _Part
    timed_modules: int
    scale: float
    """Work of the whole case over that of the part."""
    work: Work
    accuracy: Accuracy | None
    peak: int | None
    first_seconds: float
    turns: int
    """In each run; none: the first run of all was the measurement."""
    prepared: list[Prepared] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)


def measure(
    operation: Operation,
    case: Case,
    *,
    clock: Clock,
    effort: Effort,
    dtype: torch.dtype,
    factors: FactorKind,
    seed: int,
    flops_per_second: float,
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Measures all contenders of an operation. `flops_per_second` predicts what would be too slow."""
    layers = _layers(operation, case, dtype, effort, clock)

    def inputs(run: int) -> list[Workload]:
        return [
            draw(
                case,
                layers=layers,
                dtype=dtype,
                factors=factors,
                seed=seed + run * clock.inputs + turn,
                device=clock.device,
            )
            for turn in range(clock.inputs)
        ]

    entries: list[_Entry] = []
    left_out: list[LeftOut] = []
    for run in range(_RUNS):
        workloads = inputs(run)
        if run == 0:
            examine = _Examination(operation, case, clock, effort, flops_per_second, say)
            entries, left_out = examine.all(workloads[0])
        with _prepared(entries, workloads):
            _take_turns(entries, clock, partial(_say_turn, say, run))
        del workloads
        gc.collect()
    return Measurement(_rows(operation, case, entries, dtype), left_out)


def _layers(operation: Operation, case: Case, dtype: torch.dtype, effort: Effort, clock: Clock) -> int:
    allowed = min(effort.held_bytes, available_bytes(clock.device) // 2)
    held = operation.bytes_per_layer(case, dtype.itemsize) * clock.inputs
    return max(1, min(case.layers, int(allowed // held)))


class _Examination:
    """The first run of every contender, untimed but for what is too slow to be repeated: its accuracy,
    its peak of memory, and how much of the case it can be timed on."""

    def __init__(
        self,
        operation: Operation,
        case: Case,
        clock: Clock,
        effort: Effort,
        flops_per_second: float,
        say: Callable[[str], None],
    ) -> None:
        self.operation = operation
        self.case = case
        self.clock = clock
        self.effort = effort
        self.flops_per_second = flops_per_second
        self.say = say

    def all(self, workload: Workload) -> tuple[list[_Entry], list[LeftOut]]:
        """Every contender that can be measured, and those that cannot."""
        entries: list[_Entry] = []
        left_out: list[LeftOut] = []
        contenders = self.operation.contenders(workload)
        for contender in contenders:
            self._try(contender, workload, entries, left_out)
        compilable = [entry for entry in entries if entry.contender.compiled is not None]
        if self.effort.compile and compilable:
            best = min(compilable, key=lambda entry: entry.first_seconds * entry.scale)
            self._try(_compiled(best.contender), workload, entries, left_out)
        return entries, left_out

    def _try(
        self, contender: Contender, workload: Workload, entries: list[_Entry], left_out: list[LeftOut]
    ) -> None:
        self.say(contender.name)
        reason = self._too_much(contender, workload)
        if reason is None:
            try:
                entries.append(self._entry(contender, workload))
                return
            except (ImportError, torch.OutOfMemoryError, _NotCompiled) as error:
                reason = _one_line(error)
            except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                if contender.kind == "fastagg":
                    raise
                reason = _one_line(error)
        left_out.append(
            LeftOut(case=self.case.name, op=self.operation.name, contender=contender.name, reason=reason)
        )

    def _too_much(self, contender: Contender, workload: Workload) -> str | None:
        one = workload.smallest()
        work = contender.work(one)
        seconds = (work.flops + 2 * work.wide_flops) / self.flops_per_second
        if seconds > self.effort.patience:
            return f"a module would take about {seconds:.0f} s by its counted work"
        needed, free = contender.memory(one), available_bytes(self.clock.device)
        if needed > 0.6 * free:
            return f"a module would take {needed / 1e9:.1f} GB of memory, of {free / 1e9:.1f} GB"
        return None

    def _entry(self, contender: Contender, workload: Workload) -> _Entry:
        # Without counted work there is nothing to scale by.
        part: _Part = _smallest if contender.work(workload).cost else _whole
        scale, seconds, peak, accuracy = self._first(contender, workload, part)
        # As many layers as may run three times in each run.
        allowed = self.effort.contender_seconds / (_RUNS * _LEAST_TURNS * _RUNS_OF_A_TURN)
        layers = min(workload.layers, int(workload.layers * allowed / (seconds * scale)))
        if part is _smallest and not contender.one_module and layers and workload.modules > 1:
            part = _whole if layers == workload.layers else _first_layers(layers)
            scale, seconds, peak, accuracy = self._first(contender, workload, part)
        # What takes longer than all turns may is not run again: its first run is the measurement.
        least = 1 if seconds < self.effort.contender_seconds else 0
        most = int(self.effort.contender_seconds / (_RUNS * _RUNS_OF_A_TURN * seconds))
        whole = self.case.layers / workload.layers
        return _Entry(
            contender,
            part,
            part(workload).modules,
            scale * whole,
            _times(contender.work(workload), whole),
            accuracy,
            peak,
            seconds,
            max(least, min(self.effort.turns, most)),
        )

    def _first(
        self, contender: Contender, workload: Workload, part: _Part
    ) -> tuple[float, float, int | None, Accuracy | None]:
        """Scale, seconds, peak and accuracy of a first run on a part of the case."""
        chosen = part(workload)
        counted = contender.work(chosen).cost  # an import has nothing to count
        scale = contender.work(workload).cost / counted if counted else 1.0
        prepared = contender.prepare(chosen)
        peak, (seconds, result) = self.operation.peak(
            self.clock.device, lambda: self.clock.once(prepared.run)
        )
        accuracy = None
        if contender.kind != "limit":
            accuracy = self.operation.accuracy(chosen, contender.outcome(result))
            if accuracy is not None and not math.isfinite(accuracy.error):
                raise FloatingPointError(f"{contender.name}: what it finds is not finite")
        del result
        prepared.clean()
        if seconds < self.effort.contender_seconds:
            # The first run also pays for what is made once, in time and in memory.
            peak, (seconds, result) = self.operation.peak(
                self.clock.device, lambda: self.clock.once(prepared.run)
            )
            del result
            prepared.clean()
        return scale, seconds, peak, accuracy


class _NotCompiled(Exception):
    """What torch.compile cannot do here: no compiler, an op without a lowering."""


def _compiled(contender: Contender) -> Contender:
    """The same through torch.compile, whose work at the first call is done before anything is timed."""
    assert contender.compiled is not None
    torch._dynamo.reset()  # past cases' shapes use up the recompilations, and then it runs uncompiled
    made = contender.compiled()

    def prepare(workload: Workload) -> Prepared:
        warm = made.prepare(workload)
        try:
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                warm.run()
        except Exception as error:
            raise _NotCompiled(f"{type(error).__name__}: {_one_line(error)}"[:200]) from error
        warm.clean()
        return made.prepare(workload)

    return replace(made, prepare=prepare, outcome=contender.outcome)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _whole(workload: Workload) -> Workload:
    return workload


def _smallest(workload: Workload) -> Workload:
    return workload.smallest()


def _first_layers(count: int) -> _Part:
    return lambda workload: workload.first_layers(count)


def _times(work: Work, factor: float) -> Work:
    return Work(work.bytes * factor, work.flops * factor, work.wide_flops * factor)


@contextmanager
def _prepared(entries: list[_Entry], workloads: list[Workload]) -> Iterator[None]:
    """Every contender with memory of its own for each of the inputs."""
    for entry in entries:
        entry.seconds.append([])
        if entry.turns:
            chosen = (entry.part(workload) for workload in workloads)
            entry.prepared = [entry.contender.prepare(part) for part in chosen]
    try:
        yield
    finally:
        for entry in entries:
            entry.prepared = []


def _say_turn(say: Callable[[str], None], run: int, name: str) -> None:
    say(f"{name}, run {run + 1} of {_RUNS}")


def _take_turns(entries: list[_Entry], clock: Clock, say: Callable[[str], None]) -> None:
    most = max((entry.turns for entry in entries), default=0)
    for turn in range(most):
        for entry in entries if turn % 2 == 0 else reversed(entries):
            if turn >= entry.turns:
                continue
            say(entry.contender.name)
            prepared = entry.prepared[turn % len(entry.prepared)]
            entry.seconds[-1].append(clock.turn(prepared.run))
            prepared.clean()


def _rows(operation: Operation, case: Case, entries: list[_Entry], dtype: torch.dtype) -> list[Row]:
    medians = {}
    for entry in entries:
        turns = [seconds for run in entry.seconds for seconds in run] or [entry.first_seconds]
        medians[entry.contender.name] = statistics.median(turns) * entry.scale
    rates = _limits(entries, medians)
    rows = []
    for entry in entries:
        contender = entry.contender
        seconds = medians[contender.name]
        turns = [s * entry.scale for run in entry.seconds for s in run] or [seconds]
        low, high = _quartiles(turns)
        ratios = {}
        if contender.kind == "fastagg":
            ratios = {name: other / seconds for name, other in medians.items() if name != contender.name}
        share = None
        if contender.kind != "limit":
            share = _least_seconds(entry.work, rates, seconds)
        rows.append(
            Row(
                case=case.name,
                op=operation.name,
                contender=contender.name,
                kind=contender.kind,
                seconds=seconds,
                low=low,
                high=high,
                turns=len(turns),
                noise=_noise(entry.seconds),
                modules=case.modules,
                timed_modules=entry.timed_modules,
                clients=case.clients,
                rows=case.rows,
                bytes_in=float(case.elements_per_layer * case.layers * dtype.itemsize),
                bytes=entry.work.bytes,
                flops=entry.work.flops,
                wide_flops=entry.work.wide_flops,
                share_of_limit=share,
                peak_bytes=entry.peak,
                error=entry.accuracy.error if entry.accuracy else None,
                orthogonality=entry.accuracy.orthogonality if entry.accuracy else None,
                ratios=ratios,
            )
        )
    return rows


def _limits(entries: list[_Entry], medians: dict[str, float]) -> Work:
    """Bytes and flops a second that the limits reached; 0 where there is no such limit."""
    rates = Work()
    for entry in entries:
        if entry.contender.kind == "limit":
            rates += _times(entry.work, 1 / medians[entry.contender.name])
    return rates


def _least_seconds(work: Work, rates: Work, seconds: float) -> float | None:
    """The share of `seconds` that the work would take if data moved at the copy's rate while the
    products ran at theirs. Of what has no limit there, nothing is said."""
    needed = ((work.bytes, rates.bytes), (work.flops, rates.flops), (work.wide_flops, rates.wide_flops))
    moving, product, wide = (amount / rate if rate else 0.0 for amount, rate in needed)
    if not moving + product + wide:
        return None
    return max(moving, product + wide) / seconds


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _noise(runs: list[list[float]]) -> float | None:
    if len(runs) < _RUNS or not all(runs):
        return None
    medians = [statistics.median(run) for run in runs]
    return max(medians) / min(medians) - 1
