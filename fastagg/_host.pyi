from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

def build_plan(
    tables: Sequence[Array],
    modules: Sequence[Array],
    scales: Sequence[Array],
    bucket: Array,
    place: Array,
    lengths: Array,
) -> list[tuple[Array, Array, Array, Array]]: ...
def build_info() -> dict[str, Any]: ...
