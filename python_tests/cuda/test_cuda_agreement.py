"""Every op on CUDA beside its CPU twin, and its bits under every order of threads."""

from __future__ import annotations

import pytest
import torch
from on_device import namespace, needs_shim, on_gpu
from op_calls import called
from op_samples import NAMES, samples
from simt.bindings import load_bindings
from simt.build import in_every_order
from torch import Tensor

TO_THE_BIT = ("stack", "stack_", "redistribute", "redistribute_")


def product(found: list[Tensor]) -> Tensor:
    U, S, Vt, _ = found
    return (U.double() * S.double()[:, None]) @ Vt.double()


def assert_agree(name: str, found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
    if "svd" in name:
        # Vectors of near singular values are anyone's choice; what they multiply to is not.
        scale = float(product(expected).abs().max()) if expected[0].numel() else 0.0
        torch.testing.assert_close(product(found), product(expected), rtol=0, atol=4e-6 * scale)
        torch.testing.assert_close(found[3][:, 0], expected[3][:, 0], rtol=1e-6, atol=0)
        assert torch.equal(found[3][:, 2], expected[3][:, 2])
        return
    for x, y in zip(found, expected, strict=True):
        if not x.is_floating_point() or (name in TO_THE_BIT and x.dtype != torch.float64):
            assert torch.equal(x, y)
        elif x.dtype == torch.float64:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        else:
            torch.testing.assert_close(x, y, rtol=torch.finfo(x.dtype).eps, atol=2e-6)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_cpu_op(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name]:
        found = called(namespace(), name, sample, "cuda" if on_gpu() else "cpu")
        assert_agree(name, found, called(torch.ops.fastagg, name, sample, "cpu"))


@needs_shim
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_the_order_of_threads(name: str, rng: torch.Generator) -> None:
    for sample in samples(rng)[name][:2]:
        in_every_order(
            load_bindings(), lambda sample=sample: tuple(called(namespace(), name, sample, "cpu"))
        )
