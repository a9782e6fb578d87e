"""Every random draw of a run has a seed of its own, from the run's seed and what the draw is for.

Hence nothing depends on the order in which clients train, on how many processes do, or on where a run
was interrupted: there is no generator whose state would have to be kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(run_seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^63) for one purpose, such as ``seed_of(0, "batches", round, client)``."""
    text = "\x1f".join([str(run_seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """For a library that draws from torch's global generators (dropout, initial weights): they begin
    at ``seed`` inside the block, on the CPU and on ``device``, and are as they were after it."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
