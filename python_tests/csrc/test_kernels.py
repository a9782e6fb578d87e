"""The CPU kernels without torch under the sanitizers: no byte beyond a buffer, no race, equal bits."""

from __future__ import annotations

import pytest
from sanitized import ADDRESS, CSRC, HERE, THREAD, build, run

SOURCES = [*sorted((CSRC / "cpu").glob("*.cpp")), HERE / "plain_runtime.cpp", HERE / "kernels.cpp"]


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        pytest.param(ADDRESS, [], id="address"),
        # What runs on a processor without AVX-512 is tested on one that has it.
        pytest.param([*THREAD, "-DFASTAGG_PORTABLE"], ["threads"], id="thread, portable"),
    ],
)
def test_ragged_sizes(
    flags: list[str], arguments: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Buffers of exactly their size, at any alignment; tasks in every order and on three threads."""
    folder = tmp_path_factory.mktemp("kernels")
    program = build(folder, "kernels", SOURCES, flags)
    run(program, str(seed), "8", *arguments)
