"""`reconstruct_`, W += dW in bf16, beside torch's products and a copy of W."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.timing import Clock, row
from fastagg import ops


def candidates(W: Tensor, A: Tensor, Bt: Tensor, c: Tensor) -> dict[str, Callable[[], object]]:
    """W += sum_r c_r Bt_r^T A_r, or the sum without c, in every way, by name.

    What knows no coefficients is given A multiplied by them, rounded, and not charged for it.
    """
    weighted = (A * c[:, :, None]).to(A.dtype)
    B = Bt.mT
    return {
        "reconstruct_": lambda: ops.reconstruct_(W, A, Bt, c, route="kernel"),
        "reconstruct_, weighted before": lambda: ops.reconstruct_(W, weighted, Bt, route="kernel"),
        "reconstruct_, library route": lambda: ops.reconstruct_(W, weighted, Bt, route="library"),
        "baddbmm in place": lambda: torch.baddbmm(W, B, weighted, out=W),
        "bmm, then add_": lambda: W.add_(torch.bmm(B, weighted)),
    }


def run(clock: Clock, quick: bool, rows: int, copy_rate: float, matrix_rate: float) -> dict[str, Any]:
    """Modules of 4096 x 4096 from bf16 stacks of R = `rows`, ten clients' coefficients."""
    size, modules = (256, 2) if quick else (4096, 16)
    device = clock.device
    A, Bt = (torch.randn(modules, rows, size, device=device).bfloat16() for _ in range(2))
    W = torch.randn(modules, size, size, device=device).bfloat16()
    c = torch.linspace(0.5, 1.5, 10, dtype=torch.float64, device=device)
    c = (c / size).repeat_interleave(rows // 10).expand(modules, -1).contiguous()
    measured = clock.measure(
        {
            **candidates(W, A, Bt, c),
            "reconstruct, fresh bf16": lambda: ops.reconstruct(
                A, Bt, c, dtype=torch.bfloat16, route="kernel"
            ),
            "bmm, fresh bf16": lambda: torch.bmm(Bt.mT, A),
            "reconstruct, fresh fp32": lambda: ops.reconstruct(A, Bt, c, route="kernel"),
        },
        3 if quick else 15,
    )
    flops = 2.0 * modules * size * size * rows
    moved = 2.0 * W.numel() * W.element_size()
    own, plain = (measured[name].median for name in ("reconstruct_", "reconstruct_, weighted before"))
    baddbmm = measured["baddbmm in place"].median
    return {
        "case": f"reconstruct_ into bf16, {modules} modules of {size} x {size}, R = {rows}",
        "rows": [
            row(name, time, flops / time.median / 1e12, "TFLOP/s") for name, time in measured.items()
        ],
        "share_of_copy": moved / own / copy_rate,
        "share_of_matrix_rate": flops / own / matrix_rate,
        "times_faster_than_baddbmm": baddbmm / own,
        "times_faster_than_baddbmm_weighted_before": baddbmm / plain,
        "times_faster_than_add_after": measured["bmm, then add_"].median / own,
    }
