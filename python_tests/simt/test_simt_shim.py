"""The shim sees what it is there to see: kernels with one mistake each fail, right ones do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simt.build import SANITIZED, SHIM, address, in_every_order, load, sanitizer_environment

THREADS = 64


@pytest.fixture(scope="module")
def planted():
    return load("planted", [SHIM / "planted.cu"])


def double(count: int) -> torch.Tensor:
    return torch.full((count,), 7.0, dtype=torch.float64)


def test_a_missing_barrier_gives_other_bits_in_another_order(planted, rng):
    values = torch.rand(THREADS, generator=rng, dtype=torch.float64)

    def run(barrier: bool) -> tuple[torch.Tensor, ...]:
        out = double(THREADS)
        planted.planted_neighbour(address(values), address(out), barrier)
        return (out,)

    (out,) = in_every_order(planted, lambda: run(True))
    assert torch.equal(out, values.roll(-1))
    with pytest.raises(AssertionError, match="order of threads"):
        in_every_order(planted, lambda: run(False))


def test_shared_memory_starts_as_nan(planted):
    out = double(THREADS)
    planted.planted_unset(address(out))
    assert out.isnan().all()


def test_an_asynchronous_copy_arrives_only_when_it_is_waited_for(planted, rng):
    values = torch.rand(2 * THREADS, generator=rng, dtype=torch.float64)
    out = double(2 * THREADS)
    planted.planted_copied(address(values), address(out), True)
    assert torch.equal(out, values)
    planted.planted_copied(address(values), address(out), False)
    assert out.isnan().all()


def test_tensor_core_functions_multiply(planted, rng):
    a = torch.randn(16, 16, generator=rng).bfloat16()
    b = torch.randn(16, 8, generator=rng).bfloat16()
    d = torch.zeros(16, 8)
    planted.planted_product_bf16(address(a), address(b), address(d))
    expected = a.double() @ b.double()
    assert (d - expected).abs().max() <= 2**-22 * (a.double().abs() @ b.double().abs()).max()

    a64 = torch.randn(8, 4, generator=rng, dtype=torch.float64)
    b64 = torch.randn(4, 8, generator=rng, dtype=torch.float64)
    d64 = torch.zeros(8, 8, dtype=torch.float64)
    planted.planted_product_f64(address(a64), address(b64), address(d64))
    torch.testing.assert_close(d64, a64 @ b64, rtol=1e-14, atol=1e-14)


def test_tensor_cores_cut_off_what_lies_far_below_the_largest_product(planted):
    """1 + 15 x 2^-25 = 1 + 3.75 x 2^-23, of which fp32 would hold three."""
    a = torch.full((16, 16), 2.0**-25, dtype=torch.bfloat16)
    a[:, 3] = 1.0
    b = torch.ones(16, 8, dtype=torch.bfloat16)
    d = torch.zeros(16, 8)
    planted.planted_product_bf16(address(a), address(b), address(d))
    assert torch.equal(d, torch.ones(16, 8))
    a[:, 3] = 2.0**-20  # nothing lies that far below
    planted.planted_product_bf16(address(a), address(b), address(d))
    assert torch.equal(d, torch.full((16, 8), 2.0**-20 + 15 * 2.0**-25))


PROGRAM = """
import torch
from simt.build import SHIM, address, load
planted = load("planted", [SHIM / "planted.cu"])
values, out = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
{call}
print("survived")
"""


def outcome(call: str, sanitized: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(call=call)],
        cwd=Path(__file__).parents[1],
        env=sanitizer_environment() if sanitized else None,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("call", "finding"),
    [
        ("planted.planted_divergent(address(out))", "a barrier that other threads never reach"),
        ("planted.planted_half_a_warp(address(out))", "a barrier that other threads never reach"),
        ("planted.planted_misplaced_rows(address(out), 4)", "not aligned to 16 bytes"),
    ],
)
def test_what_a_gpu_would_not_survive_ends_the_program(call, finding):
    done = outcome(call)
    assert done.returncode != 0 and finding in done.stderr, done.stderr


@pytest.mark.skipif(SANITIZED, reason="a run within this run")
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (
            "planted.planted_beyond(address(values), address(out), 63)",
            "planted.planted_beyond(address(values), address(out), 200)",
        ),
        (
            "planted.planted_beyond_shared(address(out), 7)",
            "planted.planted_beyond_shared(address(out), 8)",
        ),
    ],
    ids=["global memory", "shared memory"],
)
def test_an_access_out_of_bounds_is_found_by_the_sanitizer(good, bad):
    assert "survived" in outcome(good, sanitized=True).stdout
    done = outcome(bad, sanitized=True)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr
