"""How an operation is measured: turns, scaling, what is left out, and the arithmetic of the rows.

The contenders are made up. Where arithmetic is tested, a run says itself how long it takes, and the
clock believes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import pytest
import torch
from small_cases import CPU, dense

from fastagg.bench.cases import Case, Projection
from fastagg.bench.clock import Clock, CpuClock
from fastagg.bench.contender import Accuracy, Contender, Kind, Operation, Prepared, Work
from fastagg.bench.examination import EFFORTS, Effort
from fastagg.bench.measure import Measurement, measure
from fastagg.bench.record import Row
from fastagg.bench.workload import Workload

CASE = Case("made-up", "", 4, (Projection("q", 24, 16, (2, 1)), Projection("up", 40, 24, (2, 1))))
ONE_MODULE = replace(CASE, layers=1, projections=CASE.projections[:1])
EFFORT = Effort(3, 0.001, 1.0, 2.0, 1 << 24, compile=False)


@dataclass(frozen=True)
class ToldClock:
    """Takes a run's result for its seconds."""

    device: torch.device = CPU
    inputs: int = 1

    def once(self, run: Callable[[], Any]) -> tuple[float, Any]:
        seconds = run()
        return seconds, seconds

    def turn(self, run: Callable[[], Any]) -> float:
        return float(run())


def products(workload: Workload) -> float:
    """Something of which the modules have unequal shares."""
    return float(sum(b.modules * b.m * b.n for b in workload.buckets))


def told(
    name: str,
    seconds: Callable[[Workload, int], float] | float,
    kind: Kind = "baseline",
    work: Callable[[Workload], Work] = lambda w: Work(flops=products(w)),
    **options: Any,
) -> Contender:
    """seconds: of (what it is given, how many runs it had before), or always the same."""
    runs = 0

    def prepare(workload: Workload) -> Prepared:
        def run() -> float:
            nonlocal runs
            runs += 1
            return seconds if isinstance(seconds, float) else seconds(workload, runs - 1)

        return Prepared(run)

    return Contender(name, kind, prepare, work, **options)


def operation(
    *contenders: Contender, accuracy: Callable[..., Accuracy] = lambda w, outcome: Accuracy(0.25)
) -> Operation:
    return Operation(
        "made-up",
        "",
        "",
        lambda workload: list(contenders),
        accuracy,
        lambda case, size: case.elements_per_layer * size,
    )


def measured(
    op: Operation,
    *,
    clock: Clock | None = None,
    effort: Effort = EFFORT,
    case: Case = CASE,
    flops_per_second: float = 1e9,
    say: Callable[[str], None] = lambda text: None,
    seed: int = 0,
) -> Measurement:
    return measure(
        op,
        case,
        clock=clock or ToldClock(),
        effort=effort,
        dtype=torch.float32,
        factors="random",
        seed=seed,
        flops_per_second=flops_per_second,
        say=say,
    )


def by_name(found: Measurement) -> dict[str, Row]:
    return {row.contender: row for row in found.rows}


def plain(name: str, run: Callable[[], Any], kind: Kind = "baseline", **options: Any) -> Contender:
    return Contender(name, kind, lambda workload: Prepared(run), lambda w: Work(flops=1.0), **options)


def test_a_row_for_all_with_real_seconds() -> None:
    """Of what is instant and of what sleeps, which is known to be slower."""
    contenders = [
        plain("instant", lambda: None, "fastagg"),
        plain("sleeps", lambda: time.sleep(0.02)),
        plain("limit", lambda: None, "limit"),
    ]
    found = measured(operation(*contenders), clock=CpuClock(CPU, 1, 0.001))
    assert found.left_out == []
    assert [(r.contender, r.kind) for r in found.rows] == [
        ("instant", "fastagg"),
        ("sleeps", "baseline"),
        ("limit", "limit"),
    ]
    rows = by_name(found)
    assert rows["sleeps"].seconds >= 0.02
    assert rows["sleeps"].low >= 0.02
    assert rows["instant"].ratios["sleeps"] == rows["sleeps"].seconds / rows["instant"].seconds
    assert rows["sleeps"].ratios == {}
    for row in found.rows:
        assert (row.case, row.op, row.turns) == ("made-up", "made-up", 6)
        assert row.low <= row.seconds <= row.high
        assert row.noise is not None and row.noise >= 0
        assert (row.modules, row.timed_modules, row.clients, row.rows) == (8, 8, 2, 3)
        assert row.bytes_in == 4 * 4 * 3 * (24 + 16 + 40 + 24)
    assert [r.error for r in found.rows] == [0.25, 0.25, None]


def test_turns_interleave_and_turn_around() -> None:
    calls: list[str] = []

    def recording(name: str) -> Contender:
        return told(name, lambda workload, runs: calls.append(name) or 1e-3)

    measured(operation(*(recording(name) for name in "abc")))
    first, rest = calls[:12], calls[12:]
    assert first == [*"aaaa", *"bbbb", *"cccc"]  # a module, then all; twice each, the first one warms up
    assert rest == list("abccbaabc") * 2


def test_both_runs_have_fresh_inputs_in_fresh_memory() -> None:
    """And a clock that asks for several inputs gets other ones in each turn."""
    seen: list[tuple[float, int]] = []

    def looks(workload: Workload, runs: int) -> float:
        seen.append(
            (float(dense(workload.by_module()[0]).norm()), workload.buckets[0].flats[0].data_ptr())
        )
        return 1e-3

    measured(operation(told("looks", looks)), clock=ToldClock(inputs=2), effort=replace(EFFORT, turns=4))
    examined, first, second = seen[:4], seen[4:8], seen[8:]
    assert len(second) == 4
    assert set(examined) == {first[0]}
    assert first[:2] == first[2:] and second[:2] == second[2:]
    assert len({norm for norm, _ in first + second}) == 4
    assert first[0][1] != first[1][1]


def test_a_seed_is_the_inputs() -> None:
    def norms(seed: int) -> list[float]:
        seen: list[float] = []

        def looks(workload: Workload, runs: int) -> float:
            seen.append(float(dense(workload.by_module()[0]).norm()))
            return 1e-3

        measured(operation(told("looks", looks)), seed=seed)
        return seen

    assert norms(3) == norms(3)
    assert not set(norms(3)) & set(norms(30))


def test_what_runs_leave_is_cleaned_before_the_next() -> None:
    left: list[int] = []
    most: list[int] = []

    def run() -> float:
        left.append(1)
        most.append(len(left))
        return 1e-3

    contender = Contender(
        "leaves", "baseline", lambda w: Prepared(run, left.clear), lambda w: Work(flops=1.0)
    )
    measured(operation(contender))
    assert set(most) == {1}
    assert left == []


def test_one_module_is_scaled_to_all_by_the_counted_work() -> None:
    """Seconds that follow the work come out as those of all modules would."""
    contender = told("one", lambda w, runs: 1e-6 * products(w), "fastagg", one_module=True)
    row = measured(operation(contender)).rows[0]
    assert row.seconds == pytest.approx(1e-6 * 4 * (24 * 16 + 40 * 24), rel=1e-12)
    assert (row.modules, row.timed_modules) == (8, 1)
    assert row.scaled
    assert row.flops == 4 * (24 * 16 + 40 * 24)
    assert row.low == row.seconds == row.high


def test_layers_that_do_not_fit_are_scaled_too() -> None:
    """Three of four layers are drawn; the figures are of four."""
    layer = CASE.elements_per_layer * 4
    effort = replace(EFFORT, held_bytes=3 * layer + 1)
    work = lambda w: Work(bytes=3 * products(w), flops=products(w), wide_flops=2 * products(w))  # noqa: E731
    contender = told("all", lambda w, runs: 1e-6 * products(w), work=work)
    row = measured(operation(contender), effort=effort).rows[0]
    everything = 4 * (24 * 16 + 40 * 24)
    assert row.seconds == pytest.approx(1e-6 * everything, rel=1e-12)
    assert (row.modules, row.timed_modules) == (8, 6)
    assert row.scaled
    assert (row.bytes, row.flops, row.wide_flops) == (3 * everything, everything, 2 * everything)
    # Clocks that rotate over inputs hold several.
    row = measured(operation(contender), effort=effort, clock=ToldClock(inputs=2)).rows[0]
    assert row.timed_modules == 2
    assert row.seconds == pytest.approx(1e-6 * everything, rel=1e-12)


def test_what_is_too_slow_for_all_modules_is_timed_on_as_many_layers_as_a_turn_has_time_for() -> None:
    """A turn may take 1 s / (2 runs x 2 x 3 turns) = 83 ms; a layer takes 35 ms."""
    contender = told("slow", lambda w, runs: 0.035 * products(w) / 1344)
    row = measured(operation(contender), flops_per_second=1e4).rows[0]
    assert row.timed_modules == 4
    assert row.seconds == pytest.approx(4 * 0.035, rel=1e-12)
    assert row.turns == 6


def test_what_turns_out_quick_is_timed_on_all_modules() -> None:
    contender = told("quick", lambda w, runs: 1e-3 * products(w) / 1344)
    row = measured(operation(contender), flops_per_second=1e4).rows[0]
    assert row.timed_modules == 8
    assert not row.scaled
    assert row.seconds == pytest.approx(4e-3, rel=1e-12)


def test_fewer_turns_of_what_takes_longer() -> None:
    """Each costs two runs: 1 s is time for 1 / (2 x 2 x 0.1) = 2 turns of 0.1 s in each run."""
    rows = by_name(measured(operation(told("a", 0.1), told("b", 0.9), told("c", 0.001))))
    assert {name: row.turns for name, row in rows.items()} == {"a": 4, "b": 2, "c": 6}


def test_a_first_run_that_took_all_the_time_is_the_measurement() -> None:
    runs = []
    contender = told("slow", lambda w, before: runs.append(before) or 1.5)
    row = measured(operation(contender), case=ONE_MODULE).rows[0]
    assert runs == [0]
    assert (row.seconds, row.low, row.high) == (1.5, 1.5, 1.5)
    assert (row.turns, row.noise) == (1, None)


def test_first_runs_are_not_in_the_figures() -> None:
    """They pay for what is made once."""
    contender = told("warms up", lambda w, before: 0.5 if before == 0 else 1e-3)
    row = measured(operation(contender)).rows[0]
    assert (row.seconds, row.high, row.turns) == (1e-3, 1e-3, 6)


def test_what_would_be_too_slow_is_left_out_and_says_why() -> None:
    """2e10 flops of its smallest module at 1e9 a second; those of float64 count twice."""

    def never(workload: Workload) -> Prepared:
        raise AssertionError("it was prepared")

    contenders = [
        Contender("slow", "fastagg", never, lambda w: Work(flops=2e10 * w.modules)),
        Contender("wide", "baseline", never, lambda w: Work(wide_flops=1.5e9 * w.modules)),
        Contender("large", "baseline", never, lambda w: Work(flops=1.0), memory=lambda w: 1e15),
        told("fits", 1e-3),
    ]
    found = measured(operation(*contenders))
    assert list(by_name(found)) == ["fits"]
    reasons = {left.contender: left.reason for left in found.left_out}
    assert list(reasons) == ["slow", "wide", "large"]
    assert "about 20 s" in reasons["slow"]
    assert "about 3 s" in reasons["wide"]
    assert "1000000.0 GB" in reasons["large"]
    assert {(left.case, left.op) for left in found.left_out} == {("made-up", "made-up")}


def test_what_needs_a_package_that_is_not_there_is_left_out_with_the_sentence() -> None:
    def prepare(workload: Workload) -> Prepared:
        import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

        raise AssertionError

    missing = Contender("needs", "baseline", prepare, lambda w: Work(flops=1.0))
    found = measured(operation(missing, told("does not", 1e-3)))
    assert list(by_name(found)) == ["does not"]
    assert found.left_out[0].contender == "needs"
    assert found.left_out[0].reason == "No module named 'a_package_that_nobody_has'"


def fails(workload: Workload, runs: int) -> float:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("kind", ["fastagg", "baseline", "limit"])
def test_an_error_is_not_swallowed(kind: Kind) -> None:
    """Nor is one of a baseline: it would be a mistake of the benchmarks."""
    with pytest.raises(RuntimeError, match="a bug"):
        measured(operation(told("broken", fails, kind)))


def test_an_error_of_a_later_turn_is_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        measured(operation(told("broken", lambda w, n: 1e-3 if n < 4 else fails(w, n), "fastagg")))


def no_convergence(workload: Workload, runs: int) -> float:
    return float(torch.linalg.cholesky(-torch.eye(2))[0, 0])


def not_finite(workload: Workload, outcome: float) -> Accuracy:
    return Accuracy(float("nan") if outcome == 2e-3 else 0.25)


def test_a_baseline_that_finds_nothing_is_left_out() -> None:
    """LAPACK gives up, or what comes is not finite: for JSON a NaN would be no error at all."""
    contenders = [told("gives up", no_convergence), told("finds NaN", 2e-3), told("finds", 1e-3)]
    found = measured(operation(*contenders, accuracy=not_finite))
    assert list(by_name(found)) == ["finds"]
    reasons = {left.contender: left.reason for left in found.left_out}
    assert "cholesky" in reasons["gives up"]
    assert "not finite" in reasons["finds NaN"]


def test_if_ours_finds_nothing_it_is_an_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        measured(operation(told("ours", no_convergence, "fastagg")))
    with pytest.raises(FloatingPointError, match="ours"):
        measured(operation(told("ours", 2e-3, "fastagg"), accuracy=not_finite))


def test_work_that_is_not_counted_is_no_obstacle() -> None:
    """Of what has no flops and moves no bytes, as a process's start."""
    row = measured(operation(told("starts", 0.2, "fastagg", lambda w: Work()))).rows[0]
    assert (row.seconds, row.timed_modules, row.share_of_limit) == (0.2, 8, None)


def in_turn(*seconds: float) -> Callable[[Workload, int], float]:
    """After the two runs of the examination."""
    return lambda workload, before: seconds[0] if before < 2 else seconds[before - 2]


def test_medians_quartiles_noise_and_ratios() -> None:
    turns = (3e-3, 1e-3, 2e-3, 8e-3, 6e-3, 5e-3)
    others = (8e-3, 8e-3, 9e-3, 8e-3, 7e-3, 8e-3)
    op = operation(
        told("ours", in_turn(*turns), "fastagg"),
        told("other", in_turn(*others)),
        told("limit", 1e-3, "limit"),
    )
    row = by_name(measured(op, case=ONE_MODULE))["ours"]
    median, low, high = numpy.percentile(turns, [50, 25, 75])
    assert row.seconds == pytest.approx(median)
    assert (row.low, row.high) == (pytest.approx(low), pytest.approx(high))
    # The medians of the two runs are 2 and 6 ms.
    assert row.noise == pytest.approx(6 / 2 - 1)
    assert row.ratios == {"other": pytest.approx(8e-3 / median), "limit": pytest.approx(1e-3 / median)}


def test_noise_does_not_depend_on_which_run_was_slower() -> None:
    op = operation(told("a", in_turn(*[6e-3] * 3, *[2e-3] * 3)), told("b", in_turn(*[2e-3] * 6)))
    rows = by_name(measured(op, case=ONE_MODULE))
    assert rows["a"].noise == pytest.approx(2.0)
    assert rows["b"].noise == 0


def test_share_of_the_limits() -> None:
    """At 1e6 bytes a second, 2e6 flops and 1e6 in float64. What is moved may hide behind what is
    computed, the two kinds of products may not behind each other."""
    op = operation(
        told("computes", 0.1, "fastagg", lambda w: Work(bytes=2e4, flops=5e4, wide_flops=3e4)),
        told("moves", 0.1, "baseline", lambda w: Work(bytes=8e4, flops=5e4, wide_flops=3e4)),
        told("copy", 1e-2, "limit", lambda w: Work(bytes=1e4)),
        told("product", 1e-2, "limit", lambda w: Work(flops=2e4)),
        told("wide", 1e-2, "limit", lambda w: Work(wide_flops=1e4)),
    )
    rows = by_name(measured(op))
    assert rows["computes"].share_of_limit == pytest.approx((0.025 + 0.03) / 0.1)
    assert rows["moves"].share_of_limit == pytest.approx(0.08 / 0.1)
    assert {rows[name].share_of_limit for name in ("copy", "product", "wide")} == {None}


def test_share_of_a_scaled_limit_is_of_the_whole_case() -> None:
    """A product measured on one module is a rate: the share is the same as if all had been measured."""

    def op(one: bool) -> Operation:
        return operation(
            told("ours", lambda w, n: 0.02 * products(w) / (4 * 1344), "fastagg"),
            told("product", lambda w, n: 1e-6 * products(w), "limit", one_module=one),
        )

    one, whole = (by_name(measured(op(one)))["ours"].share_of_limit for one in (True, False))
    assert one == pytest.approx(1e-6 * 4 * 1344 / 0.02)
    assert one == pytest.approx(whole)


def test_of_work_without_a_limit_nothing_is_said() -> None:
    op = operation(
        told("ours", 0.1, "fastagg", lambda w: Work(flops=5e4)),
        told("copy", 1e-2, "limit", lambda w: Work(bytes=1e4)),
    )
    assert by_name(measured(op))["ours"].share_of_limit is None


@dataclass
class Compilable:
    """A contender with a compiled one, and how often that was asked for and run."""

    name: str
    seconds: float
    first_compiled: Callable[[], None] = lambda: None
    asked: int = 0
    log: list[str] = field(default_factory=list)

    def contender(self) -> Contender:
        def compiled() -> Contender:
            self.asked += 1

            def prepare(workload: Workload) -> Prepared:
                def run() -> float:
                    self.log.append("run")
                    if len(self.log) == 1:
                        self.first_compiled()
                        return 1e3
                    return self.seconds / 2

                return Prepared(run)

            return Contender(
                f"torch.compile of {self.name}", "baseline", prepare, lambda w: Work(flops=products(w))
            )

        plain = told(self.name, self.seconds, outcome=lambda seconds: (self.name, seconds))
        return plain.with_compiled(compiled)


def test_the_quickest_that_can_be_compiled_is() -> None:
    """And all in its row is as if it had been compiled from the beginning."""
    slow, quick = Compilable("slow", 4e-3), Compilable("quick", 2e-3)
    outcomes = []

    def accuracy(workload: Workload, outcome: Any) -> Accuracy:
        outcomes.append(outcome)
        return Accuracy(0.25)

    op = operation(
        slow.contender(),
        quick.contender(),
        told("quicker", 1e-3, outcome=lambda seconds: ("quicker", seconds)),
        accuracy=accuracy,
    )
    assert [row.contender for row in measured(op).rows] == ["slow", "quick", "quicker"]
    found = measured(op, effort=replace(EFFORT, compile=True))
    assert [row.contender for row in found.rows][3:] == ["torch.compile of quick"]
    assert (slow.asked, quick.asked) == (0, 1)
    row = found.rows[3]
    assert (row.seconds, row.high, row.turns, row.error) == (1e-3, 1e-3, 6, 0.25)
    # Its result is looked at as that of the one that it is compiled from.
    assert outcomes[-1] == ("quick", 1e-3)


def test_what_cannot_be_compiled_is_left_out() -> None:
    broken = Compilable("quick", 2e-3, first_compiled=lambda: fails(None, 0))  # type: ignore[arg-type]
    found = measured(operation(broken.contender()), effort=replace(EFFORT, compile=True))
    assert list(by_name(found)) == ["quick"]
    assert found.left_out[0].contender == "torch.compile of quick"
    assert found.left_out[0].reason == "RuntimeError: a bug"


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@dataclass
class Counting:
    """torch.compile with a back end that keeps the graph as it is, and how often that was asked."""

    graphs: int = 0

    def contender(self, shapes: Callable[[Workload], list[int]]) -> Contender:
        def keep(graph: Any, inputs: Any) -> Any:
            self.graphs += 1
            return graph.forward

        def through(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Contender:
            def prepare(workload: Workload) -> Prepared:
                xs = [torch.zeros(size) for size in shapes(workload)]
                return Prepared(lambda: [function(x) for x in xs])

            return Contender(name, "baseline", prepare, lambda w: Work(flops=1.0))

        compiled = torch.compile(doubled, dynamic=False, backend=keep)
        return through("plain", doubled).with_compiled(lambda: through("compiled", compiled))


def test_each_case_is_compiled_anew() -> None:
    """torch gives up after eight shapes of a function, with a warning at most, and runs it as it is."""
    torch._dynamo.reset()
    counting = Counting()
    effort = Effort(1, 0.0, 1.0, 2.0, 1 << 24, compile=True)
    for size in range(1, 10):
        contender = counting.contender(lambda w, size=size: [size])  # type: ignore[misc]
        found = measured(
            operation(contender), effort=effort, clock=CpuClock(CPU, torch.get_num_threads(), 0.0)
        )
        assert [row.contender for row in found.rows] == ["plain", "compiled"]
        assert counting.graphs == size


def test_what_would_run_uncompiled_is_left_out() -> None:
    torch._dynamo.reset()
    contender = Counting().contender(lambda w: list(range(1, 12)))
    effort = Effort(1, 0.0, 1.0, 2.0, 1 << 24, compile=True)
    found = measured(
        operation(contender), effort=effort, clock=CpuClock(CPU, torch.get_num_threads(), 0.0)
    )
    assert [row.contender for row in found.rows] == ["plain"]
    assert "recompile_limit" in found.left_out[0].reason


def test_memory_of_a_run_beyond_its_inputs() -> None:
    """Taken from a run that is not the first, which makes what is kept."""
    peaks = iter([7, 5])

    def peak(device: torch.device, run: Callable[[], Any]) -> tuple[int | None, Any]:
        return next(peaks), run()

    op = replace(operation(told("a", 1e-3)), peak=peak)
    assert measured(op, case=ONE_MODULE).rows[0].peak_bytes == 5


def test_what_is_going_on_is_said() -> None:
    said: list[str] = []
    measured(operation(told("a", 1e-3), told("b", 1e-3)), say=said.append)
    assert {"a", "b"} <= {text.split(",")[0] for text in said}


@pytest.mark.parametrize("weaker", [("quick", "standard"), ("standard", "full")])
def test_more_effort_is_more_of_everything(weaker: tuple[str, str]) -> None:
    less, more = (EFFORTS[name] for name in weaker)
    for name in ("turns", "turn_seconds", "contender_seconds", "patience", "held_bytes", "compile"):
        assert getattr(less, name) <= getattr(more, name)
    assert less.turns >= 3
