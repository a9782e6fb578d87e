"""Every kernel's tests once more, with the kernels built by AddressSanitizer and UBSan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from simt.build import SANITIZED, sanitizer_environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The shim's own tests plant mistakes on purpose.
SUITES = sorted(
    path
    for path in HERE.glob("test_simt_*.py")
    if path.stem not in {"test_simt_shim", "test_simt_sanitized"}
)


@pytest.mark.skipif(SANITIZED, reason="this is that run")
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.stem)
def test_sanitizers_find_nothing(suite: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(suite)],
        cwd=ROOT,
        env=sanitizer_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
