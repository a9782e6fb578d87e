"""The promise of the SVD's CUDA routes on every hostile input, as fastagg.truncated_svd gives it."""

from __future__ import annotations

import pytest
import torch
from on_device import on_gpu
from svd_cases import CASES
from test_linalg_hostile import SHAPES, check

# The kernels' own route; `qr` is torch's, and `auto` one of these.
ROUTES = ("gram", "randomized", "dense")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CASES)
def test_the_promise(name: str, route: str, rng: torch.Generator, seed: int) -> None:
    for m, n, R, rank in SHAPES if on_gpu() else [(40, 33, 20, 8)]:
        check(CASES[name](m, n, R, rng), rank, route, seed)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("m", "n", "R", "rank"),
    [(1, 1, 1, 1), (1, 40, 9, 3), (40, 1, 9, 3), (30, 20, 1, 4), (5, 7, 30, 40), (7, 5, 3, 2)],
)
def test_the_smallest_shapes(
    m: int, n: int, R: int, rank: int, route: str, rng: torch.Generator, seed: int
) -> None:
    check(CASES["flat spectrum"](m, n, R, rng), rank, route, seed)
