"""ops.reconstruct and reconstruct_ on CUDA: every test of the CPU ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import simt.test_simt_reconstruct as tensor_cores
import test_ops_reconstruct
import torch
from on_device import needs_gpu, ops
from stacks import random_stack
from test_ops_reconstruct import *  # noqa: F403


@pytest.fixture(autouse=True, scope="module")
def tolerance_of_tensor_cores() -> Iterator[None]:
    """They add sixteen products at a time and cut off, where a CPU adds one by one and rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_ops_reconstruct, "tolerance", tensor_cores.tolerance)
        yield


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_library_knows_nothing_of_autograd_and_autocast(
    device: str, rng: torch.Generator
) -> None:
    A, Bt = random_stack(rng, 2, 5, 9, 7)
    expected = ops.reconstruct(A, Bt, route="library")
    A.requires_grad_()
    base = torch.zeros(2, 9, 7)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(ops.reconstruct(A, Bt, route="library"), expected)
        ops.reconstruct_(base, A, Bt, route="library")
    torch.testing.assert_close(base, expected)
