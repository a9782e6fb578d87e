"""What takes part in a measurement: ours, what users would write, and what the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from fastagg.bench.cases import Case
from fastagg.bench.memory import peak_bytes
from fastagg.bench.workload import Workload

__all__ = ["Accuracy", "Contender", "Kind", "Operation", "Prepared", "Work", "as_it_is"]

Kind = Literal["fastagg", "baseline", "limit"]


def as_it_is(value: Any) -> Any:
    """A result that is its own outcome."""
    return value


def nothing() -> None:
    """No cleaning is needed."""


@dataclass(frozen=True)
class Work:
    """What is moved and computed, counted from the algorithm; never measured.

    bytes: read and written, each operand once. flops: a multiply and an add are two; in the dtype of
    the machine's fastest product that suits (float32 on a CPU, the factors' on a GPU). wide_flops: in
    float64.
    """

    bytes: float = 0.0
    flops: float = 0.0
    wide_flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.bytes + other.bytes, self.flops + other.flops, self.wide_flops + other.wide_flops
        )

    def times(self, factor: float) -> Work:
        """So many times the work."""
        return Work(self.bytes * factor, self.flops * factor, self.wide_flops * factor)

    @property
    def cost(self) -> float:
        """A scale on which parts of the same work compare: flops where there are any, else bytes."""
        return (self.flops + self.wide_flops) or self.bytes


@dataclass(frozen=True)
class Accuracy:
    """error: what the operation says it is, in float64. orthogonality: the largest entry of
    |U^T U - I| and |V^T V - I|, where there are singular vectors."""

    error: float
    orthogonality: float | None = None


@dataclass(frozen=True)
class Prepared:
    """A run with its memory. `clean` removes what runs leave behind; it is not timed."""

    run: Callable[[], Any]
    clean: Callable[[], None] = nothing


@dataclass(frozen=True)
class Contender:
    """One way of doing an operation."""

    name: str
    kind: Kind
    prepare: Callable[[Workload], Prepared]
    work: Callable[[Workload], Work]
    outcome: Callable[[Any], Any] = as_it_is
    """What a run returns -> the first module's result, as the operation's accuracy takes it."""
    one_module: bool = False
    """It takes one module at a time, by its nature: more would only be repeats."""
    memory: Callable[[Workload], float] = field(default=lambda workload: 0.0)
    """Bytes that it holds beyond the inputs, where that may be more than a machine has."""
    compiled: Callable[[], Contender] | None = None
    """The same through torch.compile."""

    def with_compiled(self, compiled: Callable[[], Contender]) -> Contender:
        """This one, and how it is compiled."""
        return replace(self, compiled=compiled)


@dataclass(frozen=True)
class Operation:
    """Something that is measured: its contenders do the same."""

    name: str
    about: str
    error: str
    """What `Accuracy.error` is."""
    contenders: Callable[[Workload], list[Contender]]
    accuracy: Callable[[Workload, Any], Accuracy | None]
    bytes_per_layer: Callable[[Case, int], float]
    """(case, bytes an entry) -> bytes that measuring holds for each layer."""
    peak: Callable[[torch.device, Callable[[], Any]], tuple[int | None, Any]] = peak_bytes
    """How the peak of memory is found."""
