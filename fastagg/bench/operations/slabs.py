"""A bucket's stack in memory that stays, as an aggregation has it from its second round on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastagg import ops
from fastagg.bench.workload import Bucket, Workload

__all__ = ["Slabs", "empty_slabs", "slabs_of"]


@dataclass(frozen=True)
class Slabs:
    """A (L, R, n) and Bt (L, R, m) of a bucket, in the factors' dtype, and the coefficients (L, R)."""

    bucket: Bucket
    A: Tensor
    Bt: Tensor
    c: Tensor

    def fill(self) -> None:
        """Stacks the clients' factors."""
        ops.stack_(self.A, self.Bt, self.bucket.flats, self.bucket.slots)


def empty_slabs(bucket: Bucket, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for a bucket's stack whose pages are there."""
    A, Bt = (
        torch.zeros(bucket.modules, bucket.rows, size, dtype=dtype, device=bucket.device)
        for size in (bucket.n, bucket.m)
    )
    return A.fill_(1), Bt.fill_(1)


def slabs_of(workload: Workload) -> list[Slabs]:
    """Of every bucket, filled once."""
    made = []
    for bucket in workload.buckets:
        slabs = Slabs(bucket, *empty_slabs(bucket, bucket.dtype), bucket.coefficients)
        slabs.fill()
        made.append(slabs)
    return made
