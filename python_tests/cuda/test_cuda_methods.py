"""Every test of the methods, with the CUDA kernels.

device="auto" takes the GPU where there is one; where there is none, the ops that an Aggregator calls run
on the SIMT shim.
"""

from __future__ import annotations

import pytest
from on_device import namespace, on_gpu
from test_methods import *  # noqa: F403

import fastagg.ops


@pytest.fixture(autouse=True, scope="module")
def shared_tests_meet_the_device() -> None:
    """Not as ops of CPU tensors: an Aggregator moves its tensors itself."""


@pytest.fixture(autouse=True)
def kernels_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if not on_gpu():
        monkeypatch.setattr(fastagg.ops, "_ops", namespace())
