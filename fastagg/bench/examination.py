"""What is learned of each contender before it is timed: its error, its peak of memory, and how much of
the case it can be timed on in the time there is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from fastagg.bench.cases import Case
from fastagg.bench.clock import Clock
from fastagg.bench.contender import Accuracy, Contender, Operation, Prepared, Work
from fastagg.bench.memory import available_bytes
from fastagg.bench.record import LeftOut
from fastagg.bench.workload import Workload

__all__ = ["EFFORTS", "RUNS", "Effort", "Entry", "Examination"]

RUNS = 2
"""Of every measurement, each with fresh inputs."""

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
class Entry:
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


class Examination:
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

    def all(self, workload: Workload) -> tuple[list[Entry], list[LeftOut]]:
        """Every contender that can be measured, and those that cannot."""
        entries: list[Entry] = []
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
        self, contender: Contender, workload: Workload, entries: list[Entry], left_out: list[LeftOut]
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

    def _entry(self, contender: Contender, workload: Workload) -> Entry:
        # Without counted work there is nothing to scale by.
        part: _Part = _smallest if contender.work(workload).cost else _whole
        scale, seconds, peak, accuracy = self._first(contender, workload, part)
        # As many layers as may run three times in each run.
        allowed = self.effort.contender_seconds / (RUNS * _LEAST_TURNS * _RUNS_OF_A_TURN)
        layers = min(workload.layers, int(workload.layers * allowed / (seconds * scale)))
        if part is _smallest and not contender.one_module and layers and workload.modules > 1:
            part = _whole if layers == workload.layers else _first_layers(layers)
            scale, seconds, peak, accuracy = self._first(contender, workload, part)
        # What takes longer than all turns may is not run again: its first run is the measurement.
        least = 1 if seconds < self.effort.contender_seconds else 0
        most = int(self.effort.contender_seconds / (RUNS * _RUNS_OF_A_TURN * seconds))
        whole = self.case.layers / workload.layers
        return Entry(
            contender,
            part,
            part(workload).modules,
            scale * whole,
            contender.work(workload).times(whole),
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
