"""Arguments of every op of torch.ops.fastagg, for what must hold of all of them."""

from __future__ import annotations

from typing import Any

import torch
from stacks import FlatWriter, normal, random_bucket, random_stack

Sample = tuple[Any, ...]

MUTATED = {"stack_": 2, "reconstruct_": 1, "redistribute_": 1}
"""How many of its first arguments an op changes."""


def samples(rng: torch.Generator) -> dict[str, list[Sample]]:
    """Positional arguments as the schemas have them, several of each op, all small."""
    c32 = torch.rand(2, 11, generator=rng)
    c64 = c32.double()
    A, Bt = random_stack(rng, 2, 11, 9, 7)
    half_A, half_Bt = A.half(), Bt.bfloat16()
    wide = A.double(), Bt.double()
    strided = A.mT.contiguous().mT, torch.stack([Bt, Bt], -1)[..., 0]
    nothing = random_stack(rng, 0, 3, 4, 5)
    rowless = random_stack(rng, 2, 0, 4, 5)
    owners = torch.randint(-1, 3, (2, 11), generator=rng)
    streams = torch.tensor([5, 2])
    bucket = random_bucket(rng, ranks=[3, 5], modules=2)
    sizes = (bucket.modules, bucket.rows, bucket.m, bucket.n)
    scale = torch.rand(len(bucket.slots), generator=rng, dtype=torch.float64)
    empty = torch.empty(0, 9, dtype=torch.int64)
    writer = FlatWriter()
    offsets = writer.add(normal(rng, 9), 1), writer.add(normal(rng, 5, dtype=torch.float16), 2)
    flat = writer.flat()
    spans = torch.tensor([[offsets[0], 9, 0], [offsets[1], 5, 2], [1, 0, 1]])
    U, S, Vt = normal(rng, 2, 9, 4), torch.rand(2, 4, generator=rng), normal(rng, 2, 4, 7)
    handed = torch.tensor([[0, 3, 0, 1, 0, 100, 1], [1, 6, 1, 0, 2, 90, 2]])
    scalings = torch.tensor([2.0, 0.5], dtype=torch.float64)
    flats = [torch.zeros(300, dtype=torch.uint8) for _ in range(2)]
    W = normal(rng, 2, 9, 7)
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    return {
        "scan": [(flat, spans), (flat, spans[:0]), (normal(rng, 100), torch.tensor([[4, 99, 0]]))],
        "stack": [
            (bucket.flats, bucket.slots, scale, *sizes, f32),
            (bucket.flats, bucket.slots, None, *sizes, bf16),
            ([flat], empty, None, 0, 3, 4, 5, f16),
        ],
        "stack_": [
            (
                torch.full((2, bucket.rows, bucket.n), torch.nan, dtype=dtype),
                torch.full((2, bucket.rows, bucket.m), torch.nan, dtype=dtype),
                bucket.flats,
                bucket.slots,
                given,
            )
            for dtype, given in ((f32, scale), (bf16, None))
        ],
        "reconstruct": [
            (A, Bt, c32, f32),
            (half_A, half_Bt, c64, bf16),
            (*strided, None, f16),
            (*nothing, None, f32),
            (*rowless, None, f32),
        ],
        "reconstruct_": [
            (normal(rng, 2, 9, 7), A, Bt, c32),
            (normal(rng, 2, 9, 7, dtype=bf16), half_A, half_Bt, None),
            (normal(rng, 2, 7, 9).mT, *strided, c64),
            (normal(rng, 2, 4, 5, dtype=f16), *rowless, None),
        ],
        "gram": [(A, Bt), (half_A, half_Bt), wide, strided, nothing, rowless],
        "update_gram": [
            (A, Bt, c32, owners, 3),
            (half_A, half_Bt, None, owners, 4),
            (*wide, c64, owners, 3),
        ],
        "gram_svd": [
            (A, Bt, c32, 4),
            (half_A, half_Bt, None, 9),
            (*wide, c64, 2),
            (*strided, None, 1),
            (*nothing, None, 2),
        ],
        "randomized_svd": [
            (A, Bt, c32, 2, 2, 2, 7, None),
            (half_A, half_Bt, None, 2, 0, 0, -1, streams),
            (*wide, c64, 20, 5, 1, 2**62, streams),
        ],
        "randomized_svd_dense": [
            (W, 2, 2, 2, 0, None),
            (W.mT, 3, 9, 1, 1, streams),
            (W.double(), 1, 1, 0, 1, None),
            (W.bfloat16(), 2, 2, 2, 0, None),
        ],
        "redistribute": [
            (U, S, Vt, handed, scalings, [300, 300]),
            (U, S, Vt, handed[:0], scalings[:0], [0, 4]),
        ],
        "redistribute_": [(flats, U, S, Vt, handed, scalings)],
    }


NAMES = tuple(samples(torch.Generator().manual_seed(0)))
