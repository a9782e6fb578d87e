"""Condensing: the truncated weighted sum of a round's clients in the place of their adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fastagg import ops
from fastagg.accumulators import Chunk, DenseAccumulator, MeanAccumulator, StackAccumulator, StackSource
from fastagg.accumulators.condensed import Condensed, condensed_layout, name_of
from fastagg.accumulators.dense import DenseAverages
from fastagg.accumulators.held import Held
from fastagg.accumulators.weights import check_sums
from fastagg.errors import InvalidInput
from fastagg.handouts.choices import Settings, TruncatedSVD
from fastagg.handouts.sink import MemorySink
from fastagg.handouts.target import Target, check_ranks
from fastagg.handouts.writer import HandoutWriter
from fastagg.peft_format.layout import Layout
from fastagg.planning.budget import PeakMemory, require, slab_bytes, work_bytes
from fastagg.planning.plan import WeightTotals
from fastagg.planning.roster import Float64Array, ModuleSize, Roster
from fastagg.report import Stopwatch
from fastagg.rounds.log import module_reports
from fastagg.rounds.memory_plan import Accumulator, MemoryPlan

__all__ = ["condensed"]

_ROUNDOFF = 2.0**-53


def condensed(
    roster: Roster,
    accumulator: Accumulator,
    rank: int,
    plan: MemoryPlan,
    watch: Stopwatch,
    peak: PeakMemory,
) -> Accumulator:
    """A stack that holds all members of a round as one adapter of this rank; see :class:`Condensed`.

    The accumulator stays as it is; it is returned itself where there is nothing to give up.

    Raises:
        InvalidInput: not a rank, a method or an option that excludes it, or numbers beyond float32.
        MemoryBudgetExceeded: the work does not fit.
    """
    plan.method.check_condensing()
    (rank,) = check_ranks([rank])
    if not plan.allows("stack"):
        raise InvalidInput(
            "what is condensed is held in factors, which the dense accumulator does not keep",
            field="accumulator",
            expected="'auto' or 'stack'",
            got=repr(plan.mode),
            cure="Aggregate with accumulator='auto': dW of one that has become dense is condensed too",
        )
    if not _worthwhile(roster, accumulator, rank):
        return accumulator
    assert not isinstance(accumulator, MeanAccumulator)
    weights = _weight_sums(roster)
    source = _averages(roster, accumulator, weights)
    ranks = {
        module: min(rank, size.m, size.n, size.rank_sum) for module, size in roster.sizes.items()
    }
    layout = condensed_layout(roster, ranks, sorted(roster.whole))
    clients = tuple(sorted(roster.members))
    limit = work_bytes(source.device)
    if plan.budget is not None:
        limit = max(1, min(limit, plan.budget - accumulator.nbytes))
    writer = HandoutWriter(
        source,
        _TruncatedAverages(),
        plan.settings,
        {slot.module: ModuleSize(slot.m, slot.n, slot.rank, slot.rank) for slot in layout.slots},
        module_reports(roster),
        watch,
        peak,
        limit,
    )
    target = Target(name_of(clients), layout, roster.members[clients[0]].config, clients)
    work = max(writer.workspace_bytes([target]), _residual_bytes(source, layout))
    require(
        accumulator.nbytes + layout.nbytes + work,
        plan.budget,
        "condensing",
        "Raise max_memory, or condense earlier, when there are fewer clients",
    )
    sink = MemorySink(layout.nbytes)
    writer.write([target], [sink])
    flat = accumulator.staging.bring(sink.flat)
    with watch.stage("svd"):
        errors = _errors(source, layout, flat)
    group = Condensed(
        client=name_of(clients),
        layout=layout,
        flat=flat,
        slot_weights=np.array([weights[slot.module] for slot in layout.slots]),
        whole_weights=np.array([source.whole.total(span.key) for span in layout.whole]),
        clients=clients,
        errors=errors,
    )
    return StackAccumulator(accumulator.device, [group])


@dataclass(frozen=True)
class _TruncatedAverages(TruncatedSVD):
    """The best approximation of what is averaged as it is read."""

    def work_bytes(self, m: int, n: int, rows: int, rank: int, settings: Settings) -> int:
        """As for a finished round, and the quotient of a sum that is dense."""
        return super().work_bytes(m, n, rows, rank, settings) + (0 if rows else 4 * m * n)


def _worthwhile(roster: Roster, accumulator: Accumulator, rank: int) -> bool:
    """Whether an adapter of this rank is less than what is held."""
    if not isinstance(accumulator, StackAccumulator):
        return bool(roster.members)
    if any(size.rank_sum > rank for size in roster.sizes.values()):
        return True
    layouts = accumulator.layouts(roster.sorted())
    holders = Counter(span.key for layout in layouts for span in layout.whole)
    return any(count > 1 for count in holders.values())


def _weight_sums(roster: Roster) -> dict[str, float]:
    """W_j of each module: the sum of the weights of the members that have it.

    Raises:
        InvalidInput: it overflows.
    """
    totals = WeightTotals("renormalise")
    for member in roster.sorted():
        totals.add(member)
    check_sums(totals)
    return totals.total


def _averages(
    roster: Roster, accumulator: StackAccumulator | DenseAccumulator, weights: Mapping[str, float]
) -> StackSource | DenseAverages:
    """The average of the members' updates of each module, by the sums of their weights."""
    divisors = WeightTotals("renormalise")
    # A module whose clients all weigh nothing adds nothing to the sum, whatever it is divided by.
    divisors.total = {module: total or 1.0 for module, total in weights.items()}
    if isinstance(accumulator, StackAccumulator):
        return accumulator.averages(roster.sorted(), divisors)
    return accumulator.averages(divisors)


def _residual_bytes(source: StackSource | DenseAverages, layout: Layout) -> int:
    """Bytes that measuring the error of one module takes, from above."""
    needs = [0]
    for bucket, shape in enumerate(source.index.buckets):
        for module, rows in zip(shape.modules, source.rows(bucket), strict=True):
            kept = layout.by_module[module].rank
            if rows:
                both = rows + kept + 8
                needs.append(2 * slab_bytes(both, shape.m, shape.n, 4) + 8 * 8 * both**2)
            else:
                needs.append((4 + 2 * 8) * shape.m * shape.n + 2 * slab_bytes(kept, shape.m, shape.n, 8))
    return max(needs)


def _errors(source: StackSource | DenseAverages, layout: Layout, flat: torch.Tensor) -> Float64Array:
    """(J,) |average - what is kept of it|_F from above, with what was given up before; in slot order."""
    ones = np.ones(len(layout.slots))
    held = Held("condensed", layout, flat, ones, np.zeros(len(layout.whole)))
    kept = StackSource([held], [ones], source.index, source.device, {})
    found: dict[str, torch.Tensor] = {}
    for bucket, shape in enumerate(source.index.buckets):
        for place, module in enumerate(shape.modules):
            part = bucket, place, place + 1
            found[module] = _distance(source.load(*part), kept.load(*part))
    return np.array(
        [float(found[slot.module]) + source.discarded.get(slot.module, 0.0) for slot in layout.slots]
    )


def _distance(exact: Chunk, kept: Chunk) -> torch.Tensor:
    """|dW - dW'|_F of one module from above, for factors that were computed for dW in float32.

    Measured, not inferred from the singular values: it covers the rounding of the factors that are
    kept, whatever route they came by. Of two stacks it is the norm of one, [B -B'] [A; A'], by Gram
    matrices; what rounding may have hidden in those (about 1e-6 |dW| where m = n = 4096) is added.
    """
    if exact.dense is not None:
        difference = exact.dense[0].double()
        a, b = kept.exact_factors(0)
        return difference.addmm_(b, a, alpha=-1).square().sum().sqrt()
    a, bt = (
        torch.cat([mine.float(), theirs], 1)
        for mine, theirs in zip(exact.factors, kept.factors, strict=True)
    )
    assert exact.coefficients is not None
    assert kept.coefficients is not None
    c = torch.cat([exact.coefficients, -kept.coefficients], 1)[0]
    gram_a, gram_b = (matrix[0] for matrix in ops.gram(a, bt))
    norms_a, norms_b = gram_a.diagonal().sqrt(), gram_b.diagonal().sqrt()
    square = torch.einsum("i,ij,ij,j->", c, gram_a, gram_b, c)
    # Inner products are off by n u |a_i| |a_j| and m u |b_i| |b_j|, the sum by 2 R u of its terms.
    hidden = torch.outer(norms_a, norms_a) * gram_b.abs()
    hidden += torch.outer(norms_b, norms_b) * gram_a.abs()
    steps = max(exact.m, exact.n) + 2 * len(c) + 8
    return (square.clamp(min=0) + steps * _ROUNDOFF * (c.abs() @ hidden @ c.abs())).sqrt()
