"""The package itself: lazy, and of one mind about the versions that it works with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastagg import FastAggError


@pytest.mark.parametrize("version", [None, "2.8.1", "2.10.0", "3.0"])
def test_a_version_that_was_never_tried_is_named_with_those_that_work(
    tmp_path: Path, version: str | None
) -> None:
    if version is None:
        prepare = "metadata.version = lambda name: metadata.Distribution.from_name('no-such-thing')"
    else:
        # The distribution that is found first is the one that counts.
        prepare = f"sys.path.insert(0, {str(tmp_path)!r})"
        folder = tmp_path / f"nvflare-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvflare\nVersion: {version}\n")
    code = f"import sys; from importlib import metadata; {prepare}; import fastagg.engines.nvflare"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert FastAggError.__name__ in line
    assert "nvflare >= 2.9, < 2.10" in line and "fastagg[nvflare]" in line
    assert (version or "not installed") in line


def test_fastagg_does_not_import_nvflare() -> None:
    code = (
        "import sys, fastagg, fastagg.engines, fastagg.engines.exchange; "
        "assert 'nvflare' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_the_package_promises_is_there() -> None:
    pytest.importorskip("nvflare")
    import fastagg.engines.nvflare as package

    assert all(hasattr(package, name) for name in package.__all__)
