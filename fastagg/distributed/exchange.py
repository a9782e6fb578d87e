"""Clients that came to different ranks, brought to the ranks that have their modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import torch

from fastagg.accumulators import Accumulator, DenseAccumulator, MeanAccumulator, StackAccumulator
from fastagg.accumulators.weights import WeightUnit
from fastagg.accumulators.whole import WholeSums, sum_dtype
from fastagg.distributed.group import Group
from fastagg.distributed.share import ShareOfModules
from fastagg.planning.plan import WeightTotals
from fastagg.planning.roster import Member

__all__ = ["bring", "bring_clients", "bring_sums"]

Sums = DenseAccumulator | MeanAccumulator

# Bytes that one collective carries.
_AT_ONCE = 32 << 20


def bring(
    share: ShareOfModules,
    held: Sequence[tuple[str, Sequence[Member]]],
    mine: Accumulator,
    target: Accumulator,
) -> None:
    """Brings all clients to the ranks that have their modules; collective.

    Args:
        held: by rank, its kind of accumulator and the clients in it.
        mine: this rank's.
        target: an empty one for the modules that are this rank's share.
    """
    if not isinstance(target, StackAccumulator):
        bring_sums(share, None if isinstance(mine, StackAccumulator) else mine, target)
    stacks = [members if kind == "stack" else [] for kind, members in held]
    bring_clients(share, stacks, mine.flats if isinstance(mine, StackAccumulator) else {}, target)


def bring_clients(
    share: ShareOfModules,
    held: Sequence[Sequence[Member]],
    flats: Mapping[str, torch.Tensor],
    target: StackAccumulator | Sums,
) -> None:
    """Sends each client's factors to the ranks of its modules, which add them; collective.

    One client of each rank is under way at a time: that is the memory beside the accumulators.

    Args:
        held: by rank, the clients of which it holds the factors.
        flats: their buffers, of those held here.
        target: of the modules that are this rank's share.
    """
    group, nothing = share.group, torch.empty(0, dtype=torch.uint8, device=target.device)
    for turn in range(max(map(len, held))):
        sent = [nothing] * group.size
        arriving = [clients[turn] if turn < len(clients) else None for clients in held]
        leaving = arriving[group.rank]
        if leaving is not None:
            flat = flats[leaving.client]
            sent = [share.part(leaving.layout, to).of(flat) for to in range(group.size)]
        lengths = [0 if member is None else share.part_of(member.layout).nbytes for member in arriving]
        received = group.exchange(sent, lengths)
        with group.agreeing():
            for member, flat in zip(arriving, received, strict=True):
                if member is not None:
                    target.add([share.member(member)], [flat])


def bring_sums(share: ShareOfModules, sums: Sums | None, target: Sums) -> None:
    """Adds the sums of all ranks up at the ranks of their modules; collective.

    Sums of dW come in one unit, the largest of all ranks', by powers of two: each entry is rounded
    once more for each rank.

    Args:
        sums: those of the clients here; None where there are none, as where the factors are held.
        target: an empty accumulator for the modules that are this rank's share.
    """
    sizes, device = share.whole.sizes, target.device
    if isinstance(target, DenseAccumulator):
        assert not isinstance(sums, MeanAccumulator)
        target.blocks.make_room({name: (size.m, size.n) for name, size in share.own.sizes.items()})
        ratio = _join_unit(share.group, target.unit, None if sums is None else sums.unit)
        counts = {name: size.m * size.n for name, size in sizes.items()}
        _add_up(share, "module", counts, _dense(sums), ratio, _dense(target), torch.float32, device)
    else:
        assert not isinstance(sums, DenseAccumulator)
        target.reserve(share.own.sizes)
        for module, size in share.own.sizes.items():
            block, place = target.blocks.index.where(module)
            target.blocks.sums[block].ranks[place] = size.width
        for which in ("a", "bt"):
            counts = {
                name: size.width * (size.n if which == "a" else size.m)
                for name, size in sizes.items()
            }
            mine, theirs = _factors(sums, which), _factors(target, which)
            _add_up(share, "module", counts, mine, 1.0, theirs, torch.float64, device)
    found = [totals for totals in share.gather(None if sums is None else sums.totals) if totals]
    target.totals = reduce(WeightTotals.merged, found, target.totals).only(share.own.sizes)
    _bring_whole(share, None if sums is None else sums.whole, target.whole)


def _bring_whole(share: ShareOfModules, sums: WholeSums | None, target: WholeSums) -> None:
    totals = share.gather({} if sums is None else sums.totals)
    for key, (span, _) in share.own.whole.items():
        target.make_room(span)
        target.totals[key] = sum(each.get(key, 0.0) for each in totals)
    ratio = _join_unit(share.group, target.unit, None if sums is None else sums.unit)
    mine = {} if sums is None else sums.sums
    for dtype in (torch.float64, torch.float32):
        counts = {
            key: span.count
            for key, (span, _) in share.whole.whole.items()
            if sum_dtype(span.count) == dtype
        }
        _add_up(share, "tensor", counts, mine, ratio, target.sums, dtype, target.device)


def _join_unit(group: Group, unit: WeightUnit, own: WeightUnit | None) -> float:
    """Sets the unit of all ranks' sums; what this rank's must be multiplied by."""
    exponents = group.gather(None if own is None else own.exponent)
    unit.exponent = max((each for each in exponents if each is not None), default=None)
    return 1.0 if own is None else unit.join(own)[1]


def _dense(sums: DenseAccumulator | None) -> dict[str, torch.Tensor]:
    """dW of each module, flattened."""
    if sums is None:
        return {}
    return {
        module: values[place].view(-1)
        for bucket, values in zip(sums.blocks.buckets, sums.blocks.sums, strict=True)
        for place, module in enumerate(bucket.modules)
    }


def _factors(sums: MeanAccumulator | None, which: str) -> dict[str, torch.Tensor]:
    """The sum of A or of B transposed of each module, flattened."""
    if sums is None:
        return {}
    return {
        module: getattr(values, which)[place].view(-1)
        for bucket, values in zip(sums.blocks.buckets, sums.blocks.sums, strict=True)
        for place, module in enumerate(bucket.modules)
    }


def _add_up(
    share: ShareOfModules,
    kind: str,
    counts: Mapping[str, int],
    mine: Mapping[str, torch.Tensor],
    ratio: float,
    target: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Adds vectors of all ranks up, each at the rank that has it: reduce_scatter, piece by piece.

    Args:
        counts: elements of each vector of the round.
        mine: what this rank adds, times ``ratio``; some may be shorter, or longer by zeros, or absent.
        target: this rank's own, at least; they are overwritten.
    """
    group = share.group
    vectors: list[list[tuple[str, int]]] = [[] for _ in range(group.size)]
    for name in sorted(counts):
        vectors[share.assignment.owner[kind, name]].append((name, counts[name]))
    longest = max(sum(count for _, count in each) for each in vectors)
    step = max(1, min(longest, _AT_ONCE // (group.size * dtype.itemsize)))
    for begin in range(0, longest, step):
        parts = torch.zeros(group.size, step, dtype=dtype, device=device)
        for rank, each in enumerate(vectors):
            for name, at, lo, hi in _pieces(each, begin, begin + step):
                if name in mine:
                    values = mine[name][lo:hi]
                    parts[rank, at : at + len(values)] = values * ratio
        summed = group.scatter_sums(parts)
        for name, at, lo, hi in _pieces(vectors[group.rank], begin, begin + step):
            target[name][lo:hi] = summed[at : at + hi - lo]


def _pieces(
    vectors: Sequence[tuple[str, int]], begin: int, end: int
) -> Iterator[tuple[str, int, int, int]]:
    """The elements begin .. end - 1 of vectors laid end to end: (name, place from begin, lo, hi)."""
    start = 0
    for name, count in vectors:
        lo, hi = max(begin - start, 0), min(end - start, count)
        if lo < hi:
            yield name, start + lo - begin, lo, hi
        start += count
