"""The CPU kernels without torch under the sanitizers: no byte beyond a buffer, no race, equal bits."""

from __future__ import annotations

import pytest
from sanitized import ADDRESS, CSRC, HERE, THREAD, build, run

SOURCES = [*sorted((CSRC / "cpu").glob("*.cpp")), HERE / "plain_runtime.cpp", HERE / "kernels.cpp"]


@pytest.mark.parametrize(
    ("sanitizer", "arguments"),
    [pytest.param(ADDRESS, [], id="address"), pytest.param(THREAD, ["threads"], id="thread")],
)
def test_ragged_sizes(
    sanitizer: list[str], arguments: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Buffers of exactly their size, at any alignment; tasks in every order and on three threads."""
    folder = tmp_path_factory.mktemp("kernels")
    program = build(folder, "kernels", SOURCES, sanitizer)
    run(program, str(seed), "8", *arguments)
