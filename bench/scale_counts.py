"""What a round of FlexLoRA reads, holds, sends and computes, counted from the shapes, and how long that
takes at measured rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from bench.readme import rows_of
from fastagg.bench.cases import CASES, FLORA_RANKS, Case
from fastagg.bench.limits import MEMORY_COPY
from fastagg.bench.record import Record, Row
from fastagg.peft_format.safetensors_file import header_bytes

MOVED = "llama7b-qv-10"
OPENED = "clients-1000"
KEPT = 2 * max(FLORA_RANKS)
"""The rank of a condensed state: twice the largest that is handed out."""

_POWER_ITERATIONS = 2
_BFLOAT16, _FLOAT32 = 2, 4


@dataclass(frozen=True)
class Federation:
    """A model's seven projections and clients of FLoRA's ranks, 64 to 4 and 16 in the mean.

    Args:
        case: of the benchmarks: its projections are the model's, and its rows have the rate of products
            of these shapes.
        layers: of the whole model.
        clients: a multiple of ten.
    """

    name: str
    case: Case
    layers: int
    clients: int

    @property
    def rows(self) -> int:
        """R, of every module."""
        return self.clients * sum(FLORA_RANKS) // len(FLORA_RANKS)

    @property
    def modules(self) -> int:
        """In all layers."""
        return self.layers * len(self.case.projections)

    @property
    def entries(self) -> int:
        """Of dW in all modules."""
        return self.layers * sum(p.m * p.n for p in self.case.projections)

    @property
    def ends(self) -> int:
        """m + n, over all modules: what one rank of every module has."""
        return self.layers * sum(p.m + p.n for p in self.case.projections)

    @property
    def largest_share(self) -> float:
        """The work of the largest module over that of all: a module is on one machine."""
        return max(p.m * p.n for p in self.case.projections) / self.entries

    def share(self, machines: int) -> float:
        """The most loaded machine's part of the work."""
        return max(1.0 / machines, self.largest_share)

    @property
    def widest(self) -> int:
        """As many machines as a round's modules can keep busy."""
        return math.ceil(1 / self.largest_share)

    @property
    def client_bytes(self) -> int:
        """What all clients send, in bfloat16; a stack holds the same."""
        return self.rows * self.ends * _BFLOAT16

    @property
    def dense_bytes(self) -> int:
        """What dW takes in float32, however many clients there are."""
        return self.entries * _FLOAT32

    @property
    def handout_bytes(self) -> int:
        """What is written: an adapter for each distinct rank."""
        return sum(set(FLORA_RANKS)) * self.ends * _BFLOAT16

    @property
    def condensed_bytes(self) -> int:
        """One machine's clients as one adapter of twice the largest rank, in float32."""
        return KEPT * self.ends * _FLOAT32

    @cached_property
    def header_bytes(self) -> int:
        """Of all clients' files: where each tensor lies, which whoever reads a part has to know."""
        shapes = {}
        for layer in range(self.layers):
            for p in self.case.projections:
                key = f"base_model.model.model.layers.{layer}.{p.name}.lora_"
                shapes[f"{key}A.weight"] = (torch.bfloat16, (16, p.n))
                shapes[f"{key}B.weight"] = (torch.bfloat16, (p.m, 16))
        # safetensors sorts the keys.
        return self.clients * len(header_bytes(dict(sorted(shapes.items())), {"format": "pt"}))

    @property
    def fold_flops(self) -> float:
        """Every client's B A into dW."""
        return 2.0 * self.entries * self.rows

    @property
    def fold_bytes(self) -> float:
        """A client is added as it comes, and dW is read and written for each."""
        return 2.0 * self.dense_bytes * self.clients

    @property
    def decompose_flops(self) -> float:
        """The passes of the randomized SVD over dW."""
        passes = 2 * (_POWER_ITERATIONS + 1)
        columns = (min(KEPT, p.m, p.n) * p.m * p.n for p in self.case.projections)
        return 2.0 * passes * self.layers * sum(columns)

    @property
    def sketch_flops(self) -> float:
        """The stack's alternative: passes over the factors, and the certificate's Gram matrices."""
        passes = 2 * (_POWER_ITERATIONS + 1)
        return 2.0 * passes * self.rows * KEPT * self.ends + float(self.rows) ** 2 * self.ends


FEDERATIONS = (
    Federation("7B, 1,000 clients", CASES["llama7b-all-100"], 32, 1_000),
    Federation("70B, 100,000 clients", CASES["llama70b-layer-10"], 80, 100_000),
)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second."""

    moved: float
    """Bytes that are read, validated and written, folders to folders, beside the decomposition."""
    client: float
    """Seconds, not their inverse: what a client costs beyond its bytes, such as opening its files."""
    copied: float
    """Bytes of a memory copy, read and written."""
    fold: float
    """Flops of products of many clients' factors, added into matrices in memory."""
    decompose: float
    """Flops of the dense route: products with dW."""
    sketch: float
    """Flops of the randomized route, on the factors."""


def rates(records: Sequence[Record], case: Case) -> Rates:
    """Products from the records' rows of a case; copies from those of all whole models; reading and
    writing from two cases that are measured from folders to folders, one of many bytes and one of many
    clients with few."""
    ended = _row(records, MOVED, "end-to-end", "fastagg aggregate")
    kernels = _row(records, MOVED, "svd", "fastagg auto")
    many = _row(records, OPENED, "end-to-end", "fastagg aggregate")
    parts = _row(records, OPENED, "end-to-end", "read, kernels, write: the sum")
    copies = [
        row
        for record in records
        for row in record.rows
        if row.op == "merge" and row.contender == MEMORY_COPY
    ]
    return Rates(
        moved=ended.bytes / (ended.seconds - kernels.seconds),
        client=(many.seconds - parts.seconds) / many.clients,
        copied=statistics.median(row.bytes / row.seconds for row in copies),
        fold=_flops_a_second(_row(records, case.name, "merge", "fastagg reconstruct_, of the stack")),
        decompose=_flops_a_second(_row(records, case.name, "svd", "fastagg dense")),
        sketch=_flops_a_second(_row(records, case.name, "svd", "fastagg randomized")),
    )


def _row(records: Sequence[Record], case: str, op: str, contender: str) -> Row:
    return {row.contender: row for row in rows_of(records, case, op)}[contender]


def _flops_a_second(row: Row) -> float:
    return (row.flops + row.wide_flops) / row.seconds


@dataclass(frozen=True)
class Seconds:
    """What a machine is busy with, one after the other: derived."""

    open: float
    move: float
    fold: float
    decompose: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.open + self.move + self.fold + self.decompose


def seconds(federation: Federation, rate: Rates, machines: int) -> Seconds:
    """A machine's part where the modules are shared out and dW is summed densely.

    Every machine opens all clients' files and reads their headers; none has less than one module. The
    products B A take what the flops or the bytes take, whichever is more.
    """
    share = federation.share(machines)
    moved = federation.client_bytes + federation.handout_bytes
    return Seconds(
        open=federation.clients * rate.client,
        move=(moved * share + federation.header_bytes) / rate.moved,
        fold=share
        * max(federation.fold_flops / rate.fold, federation.fold_bytes / rate.copied),
        decompose=federation.decompose_flops * share / rate.decompose,
    )


def machines_for(federation: Federation, rate: Rates, limit: float) -> int | None:
    """The least number of machines that share the modules and are done in so many seconds; None: the
    largest module, or opening the files, takes longer."""
    counts = range(1, federation.widest + 1)
    return next((n for n in counts if seconds(federation, rate, n).total <= limit), None)
