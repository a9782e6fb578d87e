"""Aggregator(device="cuda"): every method against the equations in float64 and against the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapters import make_folder
from equations import (
    EMBEDDING,
    Client,
    all_modules,
    as_matrix,
    client,
    exact,
    mixed_round,
    optimal_error,
)
from on_device import needs_gpu
from typer.testing import CliRunner

import fastagg
from fastagg import linalg
from fastagg.accumulators.staging import Staging
from fastagg.aggregator import Aggregator
from fastagg.cli.app import app
from fastagg.errors import InvalidInput, MemoryBudgetExceeded
from fastagg.planning.budget import CHUNK_BYTES

pytestmark = needs_gpu

MIXED = (torch.bfloat16, torch.float32, torch.float16)
ROUNDS = [
    {"method": "flexlora", "accumulator": "stack"},
    {"method": "flexlora", "accumulator": "dense"},
    {"method": "flora"},
    {"method": "zeropad"},
    {"method": "hetlora"},
]
SUMS = [{"method": "flexlora", "accumulator": "dense"}, {"method": "zeropad"}]
LARGE = {f"model.layers.{layer}.attn.q_proj": (2048, 2048) for layer in range(8)}


@pytest.fixture(autouse=True, scope="module")
def shared_tests_meet_the_device() -> None:
    """Not here: tensors are on the GPU already, and meet the ops themselves."""


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """torch raises where the host waits for the device, other than by an event."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def added(clients: list[Client], device: str = "cuda", **options: object) -> Aggregator:
    aggregator = Aggregator(device=device, **options)  # type: ignore[arg-type]
    for each in clients:
        aggregator.add(each.update)
    return aggregator


def product(adapter: fastagg.Adapter, module: str) -> torch.Tensor:
    a, b = adapter.factors(module)
    return adapter.scaling(module) * b.double() @ a.double()


def close_to_cpu(mine: fastagg.Aggregate, theirs: fastagg.Aggregate, clients: list[Client]) -> None:
    """Every delta, and every product that is handed out, unless it is a truncated one."""
    for module in theirs.modules:
        expected = theirs.delta(module)
        got = mine.delta(module)
        assert got.is_cpu
        assert (got - expected).norm() <= 2e-6 * expected.norm(), module
    if mine.method.name == "flexlora":
        return
    for each in clients:
        pair = [result.adapter(client=each.name) for result in (mine, theirs)]
        assert pair[0].layout.digest == pair[1].layout.digest
        for module in pair[0].modules:
            got, expected = (product(adapter, module) for adapter in pair)
            assert (got - expected).norm() <= 1e-5 * expected.norm(), (each.name, module)


@pytest.mark.parametrize("options", ROUNDS, ids=str)
@pytest.mark.parametrize("missing", ["renormalise", "zero"])
def test_a_round_of_mixed_clients(seed: int, options: dict[str, str], missing: str) -> None:
    clients = mixed_round(seed, MIXED)
    mine, theirs = (
        added(clients, device, missing=missing, dtype="float32", **options).finalize()
        for device in ("cuda", "cpu")
    )
    close_to_cpu(mine, theirs, clients)
    if options["method"] != "flexlora":
        return
    for module in all_modules(clients):
        dw = exact(clients, module, missing)
        delta = as_matrix(mine.delta(module), dw, module == EMBEDDING)
        assert (delta - dw).norm() <= 1e-6 * dw.norm()
        for each in clients:
            if module in each.modules:
                adapter = mine.adapter(client=each.name)
                error = (product(adapter, module) - dw).norm()
                best = optimal_error(dw, adapter.rank(module))
                assert error <= best + 3e-6 * dw.norm(), (each.name, module)
    for each in clients:
        theirs.adapter(client=each.name)
    for left, right in zip(mine.report.modules, theirs.report.modules, strict=True):
        assert left.norm == pytest.approx(right.norm, rel=1e-6)
        assert left.kept == pytest.approx(right.kept, rel=1e-5)


@pytest.mark.parametrize("options", ROUNDS, ids=str)
def test_whole_tensors_are_averaged(seed: int, options: dict[str, str]) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k, weight=k + 1, saved=True) for k in range(3)]
    flats = [
        added(clients, device, dtype="float32", **options).finalize().adapter(client="c0").state_dict()
        for device in ("cuda", "cpu")
    ]
    mine, theirs = (flat["base_model.model.score.weight"] for flat in flats)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", ROUNDS, ids=str)
def test_bits_repeat_on_one_device(seed: int, options: dict[str, str]) -> None:
    clients = mixed_round(seed, MIXED)
    one, two = (added(clients, **options).finalize() for _ in range(2))
    for each in clients:
        pair = [result.adapter(client=each.name).flat for result in (one, two)]
        assert torch.equal(*pair)


def test_the_order_of_arrival_does_not_change_the_bits_of_a_stack(seed: int) -> None:
    clients = mixed_round(seed, MIXED)
    one, two = (added(each, accumulator="stack").finalize() for each in (clients, clients[::-1]))
    for each in clients:
        assert torch.equal(*(result.adapter(client=each.name).flat for result in (one, two)))


@pytest.mark.parametrize("options", SUMS, ids=str)
def test_many_clients_of_many_sizes_follow_each_other(seed: int, options: dict[str, str]) -> None:
    clients = [
        client(f"c{k:02}", 4 + 28 * (k % 3), seed=seed + k, modules=dict(list(LARGE.items())[:2]))
        for k in range(12)
    ]
    mine, theirs = (added(clients, device, **options).finalize() for device in ("cuda", "cpu"))
    for module in theirs.modules:
        expected = theirs.delta(module)
        assert (mine.delta(module) - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("options", SUMS, ids=str)
def test_a_client_is_folded_without_waiting(
    seed: int, options: dict[str, str], no_waiting: None
) -> None:
    added([client(f"c{k}", 4, seed=seed + k) for k in range(4)], **options)


def test_a_copy_overlaps_the_fold_before() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    staging = Staging(device)
    flat = torch.zeros(1 << 20, dtype=torch.uint8)
    staging.bring(flat)
    torch.cuda._sleep(1 << 31)  # the fold of the first: about a second
    folded = torch.cuda.current_stream().record_event()
    staging.bring(flat)
    assert staging._copies is not None
    staging._copies.synchronize()
    assert not folded.query()
    folded.synchronize()


@pytest.mark.parametrize("options", SUMS, ids=str)
def test_peak_memory_is_the_sums_and_two_clients(seed: int, options: dict[str, str]) -> None:
    clients = [client(f"c{k}", 256, seed=seed + k, modules=LARGE) for k in range(5)]
    each = clients[0].adapter.nbytes
    held = torch.cuda.memory_allocated()
    aggregator = Aggregator(device="cuda", **options)  # type: ignore[arg-type]
    aggregator.expect((c.name, c.adapter.layout, c.adapter.config) for c in clients)
    torch.cuda.reset_peak_memory_stats()
    for one in clients:
        aggregator.add(one.update)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    # Two parts' slabs, and, for the means, their float64 copies.
    slabs = (2 if options["method"] == "flexlora" else 6) * CHUNK_BYTES
    assert peak >= aggregator.memory + each
    assert peak <= aggregator.memory + 2 * each + slabs


def test_a_stack_takes_its_bytes_alone(seed: int) -> None:
    clients = [client(f"c{k}", 256, seed=seed + k, modules=LARGE) for k in range(4)]
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    aggregator = added(clients, accumulator="stack")
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    assert aggregator.memory <= peak <= aggregator.memory + (1 << 20)


@pytest.mark.parametrize("options", ROUNDS, ids=str)
@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_state_goes_on_on_another_device(
    seed: int, options: dict[str, str], here: str, there: str
) -> None:
    clients = mixed_round(seed, MIXED)
    first = added(clients[:3], here, dtype="float32", **options)
    state = first.state_dict()
    assert all(value.is_cpu for value in state.values() if isinstance(value, torch.Tensor))
    second = Aggregator(device=there, dtype="float32", **options)  # type: ignore[arg-type]
    second.load_state_dict(state)
    for each in clients[3:]:
        second.add(each.update)
    whole = added(clients, "cpu", dtype="float32", **options)
    close_to_cpu(second.finalize(), whole.finalize(), clients)


@pytest.mark.parametrize("options", ROUNDS, ids=str)
@pytest.mark.parametrize(("mine", "theirs"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_rounds_of_two_devices_are_joined(
    seed: int, options: dict[str, str], mine: str, theirs: str
) -> None:
    clients = mixed_round(seed, MIXED)
    joined = added(clients[:2], mine, dtype="float32", **options)
    joined.merge(added(clients[2:], theirs, dtype="float32", **options))
    whole = added(clients, "cpu", dtype="float32", **options)
    close_to_cpu(joined.finalize(), whole.finalize(), clients)


def test_a_stack_elsewhere_joins_sums(seed: int) -> None:
    clients = [client(f"c{k}", 8, seed=seed + k) for k in range(4)]
    sums = Aggregator(device="cuda")
    sums._reset("dense")
    sums.add(clients[0].update)
    sums.merge(added(clients[1:], "cpu"))
    result = sums.finalize()
    for module in all_modules(clients):
        dw = exact(clients, module)
        assert (result.delta(module).double() - dw).norm() <= 1e-6 * dw.norm()


def test_what_does_not_fit_is_refused(seed: int) -> None:
    clients = [client(f"c{k}", 64, seed=seed + k, modules=LARGE) for k in range(3)]
    plans = {
        device: Aggregator(device=device, accumulator="dense").plan_for(
            (c.name, c.adapter.layout, c.adapter.config) for c in clients
        )
        for device in ("cpu", "cuda")
    }
    assert plans["cuda"][1] >= plans["cpu"][1]
    tight = Aggregator(device="cuda", accumulator="dense", max_memory=plans["cuda"][1] // 2)
    with pytest.raises(MemoryBudgetExceeded):
        tight.add(clients[0].update)
    assert tight.clients == ()
    roomy = added(clients, accumulator="dense", max_memory=plans["cuda"][1])
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sums = roomy.memory
    roomy.finalize().adapter(client="c0")
    assert torch.cuda.max_memory_allocated() - held + sums <= plans["cuda"][1]


def test_numbers_spoiled_after_the_check_are_refused_in_the_end(seed: int) -> None:
    each = client("c0", 4, seed=seed)
    update = each.update
    update.validate()
    next(iter(each.adapter.state_dict().values())).fill_(torch.nan)
    aggregator = Aggregator(device="cuda", accumulator="dense")
    aggregator.add(update)
    for use in (aggregator.state_dict, aggregator.finalize):
        with pytest.raises(InvalidInput, match="not finite any more"):
            use()


@pytest.mark.parametrize("accumulator", ["stack", "dense"])
@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_base_weights_on_either_device(
    seed: int, accumulator: str, where: str, dtype: torch.dtype
) -> None:
    clients = [client(f"c{k}", 4, seed=seed + k) for k in range(3)]
    result = added(clients, accumulator=accumulator).finalize()
    generator = torch.Generator().manual_seed(seed)
    base = {
        f"{module}.weight": torch.randn(exact(clients, module).shape, generator=generator).to(dtype)
        for module in result.modules
    }
    merged = {name: weight.to(where, copy=True) for name, weight in base.items()}
    result.merge_into(merged)
    rounding = torch.finfo(dtype).eps
    for name, weight in base.items():
        dw = exact(clients, name.removesuffix(".weight"))
        expected = weight.double() + dw
        got = merged[name]
        assert got.device.type == where
        error = (got.cpu().double() - expected).norm()
        assert error <= rounding * expected.norm() + 1e-6 * dw.norm(), name


def test_work_goes_to_the_current_stream(seed: int) -> None:
    clients = mixed_round(seed, MIXED)
    expected = added(clients, accumulator="dense").finalize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1 << 28)
        result = added(clients, accumulator="dense").finalize()
        for module in expected.modules:
            assert torch.equal(result.delta(module), expected.delta(module))


@pytest.mark.parametrize("method", ["flexlora", "flora", "zeropad"])
def test_from_folders_to_folders(tmp_path: Path, method: str) -> None:
    clients = [make_folder(tmp_path / "in" / str(k), rank=4 * k + 4, seed=k) for k in range(3)]
    for device in ("cuda", "cpu"):
        run = CliRunner().invoke(
            app,
            ["aggregate", *map(str, clients), "--method", method, "--device", device,
             "--out", str(tmp_path / device)],
        )
        assert run.exit_code == 0, run.output
    folders = sorted(path.name for path in (tmp_path / "cuda").iterdir() if path.is_dir())
    assert folders == sorted(path.name for path in (tmp_path / "cpu").iterdir() if path.is_dir())
    for folder in folders:
        mine, theirs = (fastagg.Adapter.load(tmp_path / side / folder) for side in ("cuda", "cpu"))
        for module in mine.modules:
            got, expected = product(mine, module), product(theirs, module)
            assert (got - expected).norm() <= 1e-5 * expected.norm(), (folder, module)
    report = json.loads((tmp_path / "cuda" / "report.json").read_text())
    assert report["peak_memory_of"] == "memory_allocated"


def test_lists_of_factors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    As = [torch.randn(r, 40, generator=generator) for r in (3, 8, 5)]
    Bs = [torch.randn(24, r, generator=generator).bfloat16() for r in (3, 8, 5)]
    weights, scalings = [0.5, 2.0, 1.0], [1.0, 0.25, 3.0]
    dw = sum(w * s * B.double() @ A.double()
             for w, s, A, B in zip(weights, scalings, As, Bs, strict=True))
    there = [A.cuda() for A in As], [B.cuda() for B in Bs]
    a, b = fastagg.stack(*there, weights=weights, scalings=scalings)
    assert a.is_cuda and b.is_cuda
    assert (b.double() @ a.double() - dw.cuda()).norm() <= 1e-6 * dw.norm()
    got = fastagg.reconstruct(*there, weights=weights, scalings=scalings)
    assert (got.double() - dw.cuda()).norm() <= 1e-6 * dw.norm()
    base = torch.ones(24, 40, device="cuda")
    assert fastagg.reconstruct(*there, weights=weights, scalings=scalings, base=base) is base
    assert (base.double() - 1 - dw.cuda()).norm() <= 1e-6 * (dw.norm() + base.norm())
    U, S, Vt, info = fastagg.truncated_svd(a, b, rank=4)
    assert info.route == "gram" and U.is_cuda
    error = ((U * S) @ Vt).double().cpu() - dw
    assert error.norm() <= optimal_error(dw, 4) + 3e-6 * dw.norm()
    with pytest.raises(ValueError, match="one device"):
        fastagg.truncated_svd(a, b.cpu(), rank=4)
    with pytest.raises(ValueError, match="expected cuda"):
        fastagg.stack(there[0], Bs)


@pytest.mark.parametrize("route", ["gram", "randomized", "dense"])
def test_a_decomposition_does_not_wait(seed: int, route: str) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    a, bt = (torch.randn(3, 16, length, generator=generator, device="cuda") for length in (96, 80))
    c = torch.rand(3, 16, generator=generator, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        linalg.svd_of_stack(a, bt, c, 4, route=route)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_condensed_round_is_within_its_stated_error(seed: int) -> None:
    clients = mixed_round(seed, MIXED)
    branch = added(clients[:3])
    branch.condense(5)
    for device in ("cuda", "cpu"):
        root = added(clients[3:], device)
        received = Aggregator(device=device)
        received.load_state_dict(branch.state_dict())
        root.merge(received)
        result = root.finalize()
        for module in result.modules:
            whole = exact(clients, module)
            factors = result.factors(module)
            assert factors is not None
            kept = factors[1] @ factors[0]
            assert (whole - kept).norm() <= result.condensed_error(module) * kept.norm()
