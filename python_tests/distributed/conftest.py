"""The ranks of this folder's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


# Of a module, not of the session: other tests look at which processes are left.
@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.end()
