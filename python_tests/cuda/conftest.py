"""The tests of this folder run on a GPU where there is one, and on the SIMT shim where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from on_device import on_gpu, ops

import fastagg.linalg


def pytest_report_header() -> str:
    return "CUDA kernels run on " + (torch.cuda.get_device_name() if on_gpu() else "the SIMT shim")


@pytest.fixture(autouse=True, scope="module")
def shared_tests_meet_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test imported from a test module of the CPU ops finds the device's ops under their name."""
    homes = {getattr(value, "__module__", None) or "" for value in vars(request.module).values()}
    with pytest.MonkeyPatch.context() as patch:
        for home in homes:
            if home.startswith("test_") and hasattr(sys.modules[home], "ops"):
                patch.setattr(sys.modules[home], "ops", ops)
        patch.setattr(fastagg.linalg, "ops", ops)
        yield


@pytest.fixture(autouse=True)
def the_gpu_is_alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an illegal access every later call fails: the tests that come next would tell nothing."""
    yield
    if on_gpu():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            request.session.shouldstop = f"{request.node.nodeid} has broken the GPU's context: {error}"


@pytest.fixture(autouse=True)
def fresh_memory_is_poison() -> Iterator[None]:
    """torch fills what it allocates with NaN: what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
