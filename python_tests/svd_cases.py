"""Hostile inputs for a truncated SVD: those of the design's table, and more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from stacks import normal
from torch import Tensor


@dataclass(frozen=True)
class Case:
    A: Tensor
    """(R, n)"""
    B: Tensor
    """(m, R)"""
    c: Tensor | None = None
    rank: int | None = None
    """The rank of dW where it is known."""


Make = Callable[[int, int, int, torch.Generator], Case]
CASES: dict[str, Make] = {}


def case(name: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        CASES[name] = make
        return make

    return register


def orthonormal(rng: torch.Generator, rows: int, cols: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, cols, generator=rng, dtype=torch.float64))[0]


def gauss(m: int, n: int, R: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(rng, R, n), normal(rng, m, R)


def decay(count: int, decades: float) -> Tensor:
    return torch.logspace(0, -decades, count, dtype=torch.float64)


@case("flat spectrum")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    return Case(*gauss(m, n, R, rng), rank=min(m, n, R))


@case("rows decay over 16 decades")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    A, B = gauss(m, n, R, rng)
    root = decay(R, 8).float()
    return Case(A * root[:, None], B * root)


@case("one factor decays over 16 decades")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    A, B = gauss(m, n, R, rng)
    return Case(A, B * decay(R, 16).float())


@case("mixed columns decay over 16 decades")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    k = min(m, R)
    B = (orthonormal(rng, m, k) * decay(k, 16)) @ orthonormal(rng, R, k).mT
    return Case(normal(rng, R, n), B.float())


@case("mixed columns decay over 16 decades in float64")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    k = min(m, n, R)
    B = (orthonormal(rng, m, k) * decay(k, 8)) @ orthonormal(rng, R, k).mT
    A = (orthonormal(rng, n, k) * decay(k, 8)) @ orthonormal(rng, R, k).mT
    return Case(A.mT, B)


@case("aligned factors decay over 16 decades")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    k = min(m, n, R)
    middle, root = orthonormal(rng, R, k), decay(k, 8)
    return Case(
        (middle @ (orthonormal(rng, n, k) * root).mT).float(),
        ((orthonormal(rng, m, k) * root) @ middle.mT).float(),
    )


@case("ten identical clients")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    r = max(1, R // 10)
    A, B = gauss(m, n, r, rng)
    return Case(A.repeat(10, 1), B.repeat(1, 10), rank=min(m, n, r))


@case("ten identical clients of different weights")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    r = max(1, R // 10)
    A, B = gauss(m, n, r, rng)
    c = (torch.rand(10, generator=rng) + 0.1).repeat_interleave(r)
    return Case(A.repeat(10, 1), B.repeat(1, 10), c, rank=min(m, n, r))


@case("ten nearly identical clients")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    r = max(1, R // 10)
    A, B = (factor.repeat(10, 1) for factor in (normal(rng, r, n), normal(rng, r, m)))
    return Case(A + 1e-6 * normal(rng, *A.shape), (B + 1e-6 * normal(rng, *B.shape)).mT)


@case("one frozen A for all clients")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    r = max(1, R // 10)
    return Case(
        normal(rng, r, n, dtype=torch.bfloat16).repeat(10, 1),
        normal(rng, m, 10 * r, dtype=torch.bfloat16),
        rank=min(m, n, r),
    )


@case("some B are zero")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    A, B = gauss(m, n, R, rng)
    B[:, : R // 2] = 0
    return Case(A, B, rank=min(m, n, R - R // 2))


@case("all B are zero")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    return Case(normal(rng, R, n), torch.zeros(m, R), rank=0)


def scaled(by_a: float, by_b: float, c: float | None = None) -> Make:
    def make(m: int, n: int, R: int, rng: torch.Generator) -> Case:
        A, B = gauss(m, n, R, rng)
        weights = None if c is None else torch.full((R,), c, dtype=torch.float64)
        return Case(A * by_a, B * by_b, weights)

    return make


CASES["B times 1e20"] = scaled(1.0, 1e20)
CASES["A times 1e20"] = scaled(1e20, 1.0)
CASES["B times 1e-22"] = scaled(1.0, 1e-22)
CASES["A times 1e-22"] = scaled(1e-22, 1.0)
CASES["dW times 1e34"] = scaled(1e17, 1e17)
CASES["dW times 1e-34"] = scaled(1e-17, 1e-17)
CASES["subnormal B"] = scaled(1.0, 1e-38)
CASES["subnormal A"] = scaled(1e-38, 1.0)
CASES["subnormal factors, huge coefficients"] = scaled(1e-38, 1e-38, 1e76)
CASES["huge factors, tiny coefficients"] = scaled(1e36, 1e36, 1e-72)
CASES["gauge 1e6"] = scaled(1e-6, 1e6)
CASES["gauge 1e-30"] = scaled(1e30, 1e-30)


@case("a gauge of its own for every row, 1e+-6")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    A, B = gauss(m, n, R, rng)
    gauge = 10.0 ** (12 * torch.rand(R, generator=rng) - 6)
    return Case(A / gauge[:, None], B * gauge)


@case("coefficients of both signs")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    return Case(*gauss(m, n, R, rng), torch.randn(R, generator=rng))


@case("some coefficients are zero")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    c = torch.ones(R)
    c[::3] = 0
    return Case(*gauss(m, n, R, rng), c, rank=min(m, n, int(c.sum())))


@case("all coefficients are zero")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    return Case(*gauss(m, n, R, rng), torch.zeros(R), rank=0)


@case("coefficients spread over 60 decades")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    exponent = 60 * torch.rand(R, generator=rng, dtype=torch.float64) - 30
    return Case(*gauss(m, n, R, rng), 10.0**exponent)


@case("clients that cancel each other")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    A, B = gauss(m, n, max(1, R // 2), rng)
    return Case(A.repeat(2, 1), torch.cat([B, -B], 1), rank=0)


@case("coefficients that cancel each other")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    half = max(1, R // 2)
    A, B = gauss(m, n, half, rng)
    c = torch.tensor([0.3, -0.3]).repeat_interleave(half)
    return Case(A.repeat(2, 1), B.repeat(1, 2), c, rank=0)


def nearly_cancelling(remainder: float) -> Make:
    def make(m: int, n: int, R: int, rng: torch.Generator) -> Case:
        A, B = gauss(m, n, max(1, R // 2), rng)
        rest = remainder * normal(rng, *B.shape)
        return Case(A.repeat(2, 1), torch.cat([B, rest - B], 1))

    return make


CASES["clients that cancel but for 1e-3"] = nearly_cancelling(1e-3)
CASES["clients that cancel but for 1e-5"] = nearly_cancelling(1e-5)
CASES["clients that cancel but for 1e-7"] = nearly_cancelling(1e-7)


@case("clients that cancel in all but two directions")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    A, B = gauss(m, n, max(1, R // 2), rng)
    A[:2] *= 2
    scale = 0.5 + torch.rand(len(A), generator=rng)
    c = torch.cat([torch.ones_like(scale), -1 / scale])
    c[len(A) :][:2] = 0
    return Case(A.repeat(2, 1), torch.cat([B, B * scale], 1), c)


@case("one client outweighs the others by 1e16")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    A, B = gauss(m, n, R, rng)
    scale = torch.full((R,), 1e-4)
    scale[0] = 1e4
    return Case(A * scale[:, None], B * scale)


@case("tied singular values")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    k = min(m, n, R)
    A, B = orthonormal(rng, n, k).mT.float(), orthonormal(rng, m, k).float()
    return Case(A.contiguous(), B, rank=k)


@case("bfloat16 and float16 factors")
def _(m: int, n: int, R: int, rng: torch.Generator) -> Case:
    A, B = gauss(m, n, R, rng)
    return Case(A.bfloat16(), B.half(), torch.rand(R, generator=rng))
