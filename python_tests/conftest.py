"""Fresh random inputs in every session, and the seed that repeats them."""

from __future__ import annotations

import os
import secrets
import zlib

# Idle OpenMP threads that spin take a whole core from each other where tests share a machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

# In the environment, so that pytest-xdist's workers and subprocesses draw from the same seed.
SEED = int(os.environ.setdefault("FASTAGG_TEST_SEED", str(secrets.randbits(31))))

# A deadline measures the machine's other load, not the code.
settings.register_profile("fastagg", deadline=None, print_blob=True)
settings.load_profile("fastagg")

torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_report_header() -> str:
    return f"FASTAGG_TEST_SEED={SEED} repeats this session's random inputs"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number of the session's seed and the test's name: tests may be run alone or in any order."""
    value = SEED ^ zlib.crc32(request.node.name.encode())
    print(f"seed {value} (FASTAGG_TEST_SEED={SEED})")
    return value


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def huge_flat() -> torch.Tensor:
    """2.3 GB of address space: only the pages that a test writes take memory."""
    psutil = pytest.importorskip("psutil")
    size = 2_300_000_000
    if psutil.virtual_memory().available < 2 * size:
        pytest.skip("less than 4.6 GB of memory is available")
    return torch.empty(size, dtype=torch.uint8)
