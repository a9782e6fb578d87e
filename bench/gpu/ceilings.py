"""What this GPU can do at most: the two rates that every other figure is a share of."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.timing import Clock, row


def copy_rate(clock: Clock, quick: bool) -> float:
    """Bytes a second of a device-to-device copy, read and written both counted, of random data."""
    count = 1 << (20 if quick else 31)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    time = clock.measure({"copy": lambda: target.copy_(source)}, 3 if quick else 20)["copy"]
    return 2 * count / time.median


def matrix_rate(clock: Clock, quick: bool) -> float:
    """Flops a second of torch's bf16 matrix product of random data."""
    size = 256 if quick else 8192
    x, y = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    out = torch.empty_like(x)
    time = clock.measure({"mm": lambda: torch.mm(x, y, out=out)}, 3 if quick else 20)["mm"]
    return 2.0 * size**3 / time.median


def fp64_rate(clock: Clock, quick: bool) -> float:
    """The same in fp64, the rate that bounds the exact route."""
    size = 128 if quick else 4096
    x, y = (torch.randn(size, size, device=clock.device, dtype=torch.float64) for _ in range(2))
    out = torch.empty_like(x)
    time = clock.measure({"mm": lambda: torch.mm(x, y, out=out)}, 3 if quick else 10)["mm"]
    return 2.0 * size**3 / time.median


def run(clock: Clock, quick: bool) -> dict[str, Any]:
    """The ceilings, and the noise of measuring one of them twice."""
    count = 1 << (20 if quick else 30)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    time = clock.measure({"copy": lambda: target.copy_(source)}, 3 if quick else 20)["copy"]
    return {
        "case": "ceilings",
        "rows": [row("copy of 1 GiB", time, 2 * count / time.median / 1e12, "TB/s")],
        "copy_bytes_per_second": copy_rate(clock, quick),
        "bf16_flops_per_second": matrix_rate(clock, quick),
        "fp64_flops_per_second": fp64_rate(clock, quick),
        "noise": clock.noise(lambda: target.copy_(source), 3 if quick else 20),
    }
