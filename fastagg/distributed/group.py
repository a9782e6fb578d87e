"""A process group whose members agree on errors, and whose failures name who is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fastagg.distributed.heartbeat import Heartbeat
from fastagg.errors import FastAggError, InvalidInput, RankLost

__all__ = ["Group"]

T = TypeVar("T")

# Bytes that one collective carries: what it needs beside its argument, on a GPU and in gloo.
_AT_ONCE = 32 << 20

_groups: dict[dist.ProcessGroup, Group] = {}


class Group:
    """The processes that share a round. Every method but the properties is collective.

    Tensors go where the group's backend wants them: gloo takes those of a CPU, NCCL those of a GPU.

    Attributes:
        rank, size: of this process among them.
        agreed_on: the error that all ranks raised last.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        if not isinstance(process_group, dist.ProcessGroup):
            raise InvalidInput(
                "not a process group of this process",
                field="process_group",
                expected="what torch.distributed.new_group or init_process_group made",
                got=type(process_group).__name__,
            )
        self._pg = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.agreed_on: BaseException | None = None
        self._kinds = {device.type for device in process_group._device_types}
        self._device = torch.device("cpu" if "cpu" in self._kinds else "cuda")
        store = distributed_c10d._get_process_group_store(process_group)
        self._heart = Heartbeat(store, self.rank, self.size)

    @classmethod
    def of(cls, process_group: dist.ProcessGroup) -> Group:
        """The one Group of a process group."""
        found = _groups.get(process_group) if isinstance(process_group, dist.ProcessGroup) else None
        if found is None:
            found = _groups[process_group] = cls(process_group)
        return found

    def close(self) -> None:
        """Lets the others go on without this process; not collective."""
        self._heart.stop()
        _groups.pop(self._pg, None)

    @contextmanager
    def agreeing(self) -> Iterator[list[object]]:
        """A block that all ranks pass, or in which all raise the error of the lowest that fails.

        Yields:
            A list for what must be the same on all ranks.

        Raises:
            InvalidInput: it is not.
            RankLost: a rank did not come.
        """
        error: Exception | None = None
        same: list[object] = []
        try:
            yield same
        except RankLost:
            raise
        except Exception as caught:
            error = caught
        self._agree(error, same)

    def _agree(self, error: Exception | None, same: Sequence[object]) -> None:
        mark = hashlib.blake2b(repr(same).encode(), digest_size=8).digest()
        own = torch.tensor([error is not None, int.from_bytes(mark, "big", signed=True)])
        said = [torch.empty_like(self._placed(own)) for _ in range(self.size)]
        self._run(lambda: dist.all_gather(said, self._placed(own), group=self._pg))
        failed = [rank for rank, (bad, _) in enumerate(torch.stack(said).tolist()) if bad]
        if failed:
            errors = self.gather(None if error is None else _portable(error, self.rank))
            first = errors[failed[0]]
            assert first is not None
            self.agreed_on = error if error is not None and failed[0] == self.rank else first
            raise self.agreed_on
        if len({mark for _, mark in torch.stack(said).tolist()}) > 1:
            seen = self.gather(repr(same))
            other = next(rank for rank in range(self.size) if seen[rank] != seen[0])
            self.agreed_on = InvalidInput(
                "the ranks were not given the same",
                field="process_group",
                expected=f"{seen[0]} as rank 0 was",
                got=f"{seen[other]} on rank {other}",
                cure="Give every rank the same updates in the same order; clients whose updates only "
                "one rank has go through Aggregator.combine",
            )
            raise self.agreed_on

    def gather(self, value: T) -> list[T]:
        """What each rank has; pickled, so for small things."""
        found: list[Any] = [None] * self.size
        self._run(lambda: dist.all_gather_object(found, value, group=self._pg))
        return found

    def most(self, values: Sequence[int]) -> list[int]:
        """The largest of each number."""
        return self._reduced(torch.tensor(values), dist.ReduceOp.MAX).tolist()

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replaces a contiguous tensor by the sum of all ranks', in place."""
        flat, step = tensor.view(-1), max(1, _AT_ONCE // tensor.itemsize)
        for begin in range(0, flat.numel(), step):
            part = flat[begin : begin + step]
            part.copy_(self._reduced(part, dist.ReduceOp.SUM))

    def complete(self, tensor: torch.Tensor) -> None:
        """Fills in a contiguous tensor that is zero but where this rank alone knows it: exact bits."""
        if tensor.numel():
            self.add_up(tensor.view(-1).view(torch.uint8))

    def scatter_sums(self, parts: torch.Tensor) -> torch.Tensor:
        """Of (ranks, count) numbers, one row for each rank: the sum of all that are for this one."""
        placed = self._placed(parts)
        mine = torch.empty_like(placed[0])
        self._run(lambda: dist.reduce_scatter(mine, list(placed.unbind(0)), group=self._pg))
        return mine.to(parts.device)

    def exchange(self, sent: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
        """Sends a buffer (1-D uint8) to each rank and receives one of a known length from each."""
        outgoing = self._placed(torch.cat(list(sent)))
        incoming = torch.empty(sum(lengths), dtype=torch.uint8, device=outgoing.device)
        sizes = [buffer.numel() for buffer in sent]
        self._run(
            lambda: dist.all_to_all_single(incoming, outgoing, list(lengths), sizes, group=self._pg)
        )
        return list(torch.split(incoming.to(sent[0].device), list(lengths)))

    def _reduced(self, tensor: torch.Tensor, op: Any) -> torch.Tensor:
        placed = self._placed(tensor)
        self._run(lambda: dist.all_reduce(placed, op, group=self._pg))
        return placed.to(tensor.device)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.device.type in self._kinds else tensor.to(self._device)

    def _run(self, collective: Callable[[], object]) -> None:
        self._heart.steps += 1
        try:
            collective()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RankLost:
        try:
            silent, late = self._heart.missing()
        except RuntimeError:
            # Where no agent keeps it, the store is a part of rank 0.
            return RankLost((0,), f"the store of the process group, which it holds, is gone; {error}")
        if silent:
            return RankLost(silent, f"no sign of life from it; {error}")
        if late:
            return RankLost(late, f"it lives, but did not come within the time-out; {error}")
        return RankLost((), str(error))


def _portable(error: Exception, rank: int) -> FastAggError:
    """An error that every process can raise."""
    if isinstance(error, FastAggError):
        return error
    return FastAggError(f"rank {rank} failed: {type(error).__name__}: {error}")
