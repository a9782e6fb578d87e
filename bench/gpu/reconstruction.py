"""`reconstruct_`, W += dW in bf16, beside torch's products and a copy of W."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.timing import Clock, row
from fastagg import ops


def run(clock: Clock, quick: bool, rows: int, copy_rate: float, matrix_rate: float) -> dict[str, Any]:
    """Modules of 4096 x 4096 from bf16 stacks of R = `rows`, ten clients' coefficients."""
    size, modules = (256, 2) if quick else (4096, 16)
    device = clock.device
    A, Bt = (torch.randn(modules, rows, size, device=device).bfloat16() for _ in range(2))
    W = torch.randn(modules, size, size, device=device).bfloat16()
    c = torch.linspace(0.5, 1.5, 10, dtype=torch.float64, device=device)
    c = (c / size).repeat_interleave(rows // 10).expand(modules, -1).contiguous()
    weighted = A * c[:, :, None].bfloat16()
    B = Bt.mT

    def add_after() -> None:
        W.add_(torch.bmm(B, weighted))

    measured = clock.measure(
        {
            "reconstruct_": lambda: ops.reconstruct_(W, A, Bt, c),
            "reconstruct_, no coefficients": lambda: ops.reconstruct_(W, A, Bt),
            "baddbmm in place": lambda: torch.baddbmm(W, B, weighted, out=W),
            "bmm, then add_": add_after,
            "reconstruct fp32": lambda: ops.reconstruct(A, Bt, c),
        },
        3 if quick else 15,
    )
    flops = 2.0 * modules * size * size * rows
    moved = 2.0 * W.numel() * W.element_size()
    own = measured["reconstruct_"].median
    return {
        "case": f"reconstruct_ into bf16, {modules} modules of {size} x {size}, R = {rows}",
        "rows": [
            row(name, time, flops / time.median / 1e12, "TFLOP/s") for name, time in measured.items()
        ],
        "share_of_copy": moved / own / copy_rate,
        "share_of_matrix_rate": flops / own / matrix_rate,
        "times_faster_than_baddbmm": measured["baddbmm in place"].median / own,
        "times_faster_than_add_after": measured["bmm, then add_"].median / own,
    }
