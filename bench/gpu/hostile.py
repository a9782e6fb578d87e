"""Accuracy on the hostile inputs of the tests: the worst of each promise, on this device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu.timing import Clock
from fastagg import ops

sys.path.insert(0, str(Path(__file__).parents[2] / "python_tests"))
from svd_accuracy import Reference, loss_of_orthogonality
from svd_cases import CASES

RANK = 64


def run(clock: Clock, quick: bool) -> dict[str, Any]:
    """Excess error over |dW|, error of the singular values over sigma_1, loss of orthogonality."""
    size, R = (96, 40) if quick else (1024, 160)
    rank = min(RANK, R // 2)
    rows = []
    for name, make in CASES.items():
        case = make(size, size, R, torch.Generator().manual_seed(0))
        reference = Reference.of(case.A, case.B, case.c)
        coefficients = None if case.c is None else case.c[None].double().to(clock.device)
        A, Bt = case.A[None].to(clock.device), case.B.mT[None].contiguous().to(clock.device)
        for route in ("exact", "randomized"):
            if route == "exact":
                found = ops.gram_svd(A, Bt, coefficients, rank=rank)
            else:
                found = ops.randomized_svd(A, Bt, coefficients, rank=rank, oversampling=rank)
            U, S, Vt = (part[0].cpu() for part in found[:3])
            sigma = reference.leading(rank)
            # Where clients cancel to nothing, what is left is rounding of what they cancel.
            norm = max(reference.norm, 1e-13 * reference.terms) or 1.0
            rows.append(
                {
                    "name": f"{name}, {route}",
                    "excess": (reference.error(U, S, Vt) - reference.optimal(rank)) / norm,
                    "singular_values": float(
                        (S.double() - sigma).abs().max()
                        / (max(float(sigma[0]), 1e-13 * reference.terms) or 1.0)
                    ),
                    "orthogonality": loss_of_orthogonality(U, S, Vt),
                }
            )
    return {"case": f"hostile inputs, {size} x {size}, R = {R}, r = {rank}", "rows": rows}


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [record["case"], f"  {'':58s}{'excess':>10s}{'sigma':>10s}{'orth.':>10s}"]
    for line in record["rows"]:
        lines.append(
            f"  {line['name']:58s}{line['excess']:10.1e}{line['singular_values']:10.1e}"
            f"{line['orthogonality']:10.1e}"
        )
    return "\n".join(lines)
