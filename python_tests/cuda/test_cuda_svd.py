"""The SVD ops on CUDA: every test of the CPU ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import test_ops_svd
import torch
from on_device import on_gpu
from stacks import random_stack
from test_ops_svd import *  # noqa: F403
from test_ops_svd import ALL

del test_tall_cores_on_two_threads  # noqa: F821  about threads of the CPU
del test_a_module_has_the_same_bits_alone_and_in_a_bucket  # noqa: F821  below, of a size for the shim


@pytest.fixture(autouse=True, scope="module")
def rounding_of_a_sketch() -> Iterator[None]:
    """The skinny operand of a power iteration is one bf16 term."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_ops_svd, "SKETCH_ERROR", 2.0**-8)
        yield


@pytest.mark.sanitize
@pytest.mark.parametrize("op", ALL)
def test_the_bits_of_a_module_alone_and_in_a_bucket(op: Any, rng: torch.Generator) -> None:
    """One module whose clients cancel takes another path inside."""
    half, m, n = (22, 1101, 331) if on_gpu() else (9, 70, 67)
    A, Bt = random_stack(rng, 3, 2 * half, m, n, torch.bfloat16)
    c = torch.rand(3, 2 * half, generator=rng)
    A[1, half:], Bt[1, half:], c[1] = A[1, :half], -Bt[1, :half], 1.0
    together = op(A, Bt, c, 6)
    for module in range(3):
        one = slice(module, module + 1)
        alone = op(A[one], Bt[one], c[one], 6, torch.tensor([module]))
        assert all(torch.equal(x, y[one]) for x, y in zip(alone, together, strict=True))
