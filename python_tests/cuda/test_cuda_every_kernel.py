"""Kernels, and widths of them, that the smallest samples of each op do not reach, each launched once."""

from __future__ import annotations

import pytest
import torch
from on_device import ops
from stacks import normal, product, random_bucket, random_stack
from torch import Tensor

pytestmark = pytest.mark.sanitize


def assert_best(found: tuple[Tensor, ...], dW: Tensor, rank: int) -> None:
    U, S, Vt, stats = (part[0].double() for part in found)
    sigma = torch.linalg.svdvals(dW)
    error = (U * S) @ Vt - dW
    assert error.norm() <= sigma[rank:].norm() + 2e-6 * sigma.norm()
    torch.testing.assert_close(S, sigma[:rank], rtol=0, atol=1e-6 * float(sigma[0]))
    torch.testing.assert_close(stats[0].sqrt(), sigma.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [60, 90, 120, 150, 240])
def test_cores_of_every_size_class(rows: int, rng: torch.Generator) -> None:
    """A core's rows lie in registers, two more segments of them each time; the last core, and its
    Cholesky factors, in global memory."""
    A, Bt = random_stack(rng, 1, rows, 24, 20)
    assert_best(ops.gram_svd(A, Bt, rank=8), product(A, Bt)[0], 8)


def decaying(rng: torch.Generator, rows: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Factors of a dW whose singular values fall so fast that a sketch finds them."""
    A, Bt = random_stack(rng, 1, rows, m, n)
    scale = 2.0 ** -torch.arange(rows)[:, None]
    return A * scale, Bt * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("oversampling", [8, 60])
def test_sketches_of_every_width(dtype: torch.dtype, oversampling: int, rng: torch.Generator) -> None:
    """Test matrices that are drawn, not the identity: the skinny products have 64 or 128 columns."""
    A, Bt = (slab.to(dtype) for slab in decaying(rng, 20, 150, 140))
    sketch = {"rank": 8, "oversampling": oversampling}
    assert_best(ops.randomized_svd(A, Bt, **sketch), product(A, Bt)[0], 8)
    W = product(A, Bt).to(dtype)
    assert_best(ops.randomized_svd_dense(W, **sketch), W[0].double(), 8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_tiles_of_an_update(dtype: torch.dtype, weighted: bool, rng: torch.Generator) -> None:
    A, Bt = random_stack(rng, 1, 40, 150, 140, torch.bfloat16)
    c = torch.rand(1, 40, generator=rng, dtype=torch.float64) if weighted else None
    base = normal(rng, 1, 150, 140, dtype=dtype)
    expected = base.double() + product(A, Bt, c)
    ops.reconstruct_(base, A, Bt, c)
    atol = 4 * 2.0**-24 * float(product(A.abs(), Bt.abs()).max())
    torch.testing.assert_close(base.double(), expected, rtol=torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aligned", [False, True])
def test_several_tiles_of_a_stack(dtype: torch.dtype, aligned: bool, rng: torch.Generator) -> None:
    bucket = random_bucket(
        rng, ranks=[64, 5], m=136, n=144, dtypes=[torch.bfloat16, dtype], aligned=aligned
    )
    A, Bt, nonfinite, _ = ops.stack(bucket.flats, bucket.slots, None, dtype=dtype, **bucket.sizes())
    assert not nonfinite.any()
    for found, expected in zip((A, Bt), bucket.slabs(), strict=True):
        assert torch.equal(found, expected.to(dtype))
