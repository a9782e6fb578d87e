"""Every contender of every operation finds what the equation says: only so do their times compare."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from safetensors.torch import load_file
from small_cases import CPU, MANY_ROWS, UNEVEN, dense, drawn, off, tail, updates

from fastagg.bench.cases import Case
from fastagg.bench.clock import CpuClock
from fastagg.bench.contender import Contender, Prepared
from fastagg.bench.examination import Effort
from fastagg.bench.limits import product_limit, wide_product_limit
from fastagg.bench.measure import measure
from fastagg.bench.operations.merge import first_base
from fastagg.bench.suite import OPERATIONS
from fastagg.bench.workload import Module, Workload

DTYPES = (torch.float32, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""What rounding to a dtype changes at most, over the number."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices as small as these are done before a second thread wakes up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_stack(found: Any, module: Module, workload: Workload, name: str) -> None:
    """The factors are the clients' own, multiplied in float32: nothing is approximated."""
    A, B = found
    exact = torch.cat([c * a.double() for a, c in zip(module.As, module.c, strict=True)])
    torch.testing.assert_close(A.double(), exact, rtol=2 * UNIT[torch.float32], atol=0)
    assert torch.equal(B, torch.cat([b.float() for b in module.Bs], dim=1))
    assert off(B.double() @ A.double(), dense(module)) < 1e-7


def check_reconstruct(found: Any, module: Module, workload: Workload, name: str) -> None:
    assert found.dtype == torch.float32
    assert off(found, dense(module)) < 1e-6


def check_merge(found: Any, module: Module, workload: Workload, name: str) -> None:
    """Rounded once by ours; users' loops round dW first and the sum again."""
    before, after = first_base(workload), found
    assert after.dtype == workload.dtype
    update = dense(module)
    exact = before.double() + update
    allowed = exact.abs() + (0 if name.startswith("fastagg") else update.abs())
    bound = UNIT[workload.dtype] * allowed * 1.01 + 1e-6 * update.abs().max()
    assert ((after.double() - exact).abs() <= bound).all()


def excess(left: torch.Tensor, right: torch.Tensor, exact: torch.Tensor) -> float:
    """(error - optimal error) / |dW|, from dense matrices."""
    error = torch.linalg.norm(left.double() @ right.double() - exact)
    return float((error - tail(exact, right.shape[0])) / torch.linalg.norm(exact))


def inexact(name: str) -> bool:
    return "svd_lowrank" in name


def check_svd(found: Any, module: Module, workload: Workload, name: str) -> None:
    left, right = found
    (m, _), (_, n) = module.Bs[0].shape, module.As[0].shape
    rank = max(max(p.ranks) for p in workload.case.projections)
    assert (left.shape, right.shape) == ((m, rank), (rank, n))
    assert -1e-7 < excess(left, right, dense(module)) < (0.05 if inexact(name) else 1e-5)


def check_update_gram(found: Any, module: Module, workload: Workload, name: str) -> None:
    flat = torch.stack([update.flatten() for update in updates(module)])
    assert off(found, flat @ flat.mT) < 1e-6


def check_redistribute(found: Any, module: Module, workload: Workload, name: str) -> None:
    check_handout(found, module, module.As[0].shape[0], workload.dtype)


def check_handout(found: Any, module: Module, rank: int, dtype: torch.dtype) -> None:
    """s B A is the best approximation, of this rank, of what was decomposed: the unweighted stack."""
    A, B = found
    assert {A.dtype, B.dtype} == {dtype}
    pairs = zip(module.As, module.Bs, strict=True)
    U, S, Vt = torch.linalg.svd(torch.stack([b.double() @ a.double() for a, b in pairs]).sum(0))
    assert (A.shape, B.shape) == ((rank, Vt.shape[1]), (U.shape[0], rank))
    best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    assert off(2.0 * B.double() @ A.double(), best) < 3 * UNIT[dtype] + 1e-5
    # Balanced as FlexLoRA has it: A is Vt, all singular values are in B.
    assert off(A.double() @ A.double().mT, torch.eye(rank).double()) < 3 * UNIT[dtype] + 1e-5


def check_end_to_end(folder: Path, module: Module, workload: Workload, name: str) -> None:
    """All modules of what the first client is handed."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [module_name for bucket in workload.buckets for module_name in bucket.names]
    assert len(tensors) == 2 * len(names)
    for module_name, each in zip(names, workload.by_module(), strict=True):
        A, B = (tensors[f"base_model.model.model.{module_name}.lora_{x}.weight"] for x in "AB")
        assert {A.dtype, B.dtype} == {workload.dtype}
        assert A.shape == each.As[0].shape
        assert B.shape == each.Bs[0].shape
        allowed = 0.05 if inexact(name) else 3 * UNIT[workload.dtype] + 1e-5
        assert -1e-7 < excess(2.0 * B.double(), A, dense(each)) < allowed


def check_round(found: Any, module: Module, workload: Workload, name: str) -> None:
    """What the first client is handed, in its own rank and dtype."""
    A, B = found
    assert {A.dtype, B.dtype} == {workload.dtype}
    assert (A.shape, B.shape) == (module.As[0].shape, module.Bs[0].shape)
    allowed = 0.05 if inexact(name) else 3 * UNIT[workload.dtype] + 1e-5
    assert -1e-7 < excess(2.0 * B.double(), A, dense(module)) < allowed


CHECKS = {
    "stack": check_stack,
    "reconstruct": check_reconstruct,
    "merge": check_merge,
    "svd": check_svd,
    "redistribute": check_redistribute,
    "round": check_round,
    "update_gram": check_update_gram,
    "end-to-end": check_end_to_end,
}

CONTENDERS = {
    "stack": (2, 3),
    "reconstruct": (2, 2),
    "merge": (2, 2),
    "svd": (5, 4),
    "redistribute": (2, 2),
    "round": (1, 3),
    "update_gram": (1, 3),
    "end-to-end": (1, 3),
}
"""How many are ours and how many are baselines: none may be lost."""


def test_all_operations_are_checked() -> None:
    assert CHECKS.keys() == OPERATIONS.keys() - {"import"}


def bucket_first(workload: Workload, place: int) -> Workload:
    """The same with another bucket's first module as the one whose result is looked at."""
    buckets = workload.buckets[place:] + workload.buckets[:place]
    return replace(workload, buckets=buckets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [UNEVEN, MANY_ROWS], ids=lambda case: case.name)
@pytest.mark.parametrize("operation", CHECKS)
def test_every_contender_finds_what_the_equation_says(
    operation: str, case: Case, dtype: torch.dtype, seed: int
) -> None:
    drawn_once = drawn(case, seed=seed, dtype=dtype)
    for place in range(len(drawn_once.buckets)):
        workload = bucket_first(drawn_once, place)
        contenders = OPERATIONS[operation].contenders(workload)
        kinds = [contender.kind for contender in contenders]
        assert (kinds.count("fastagg"), kinds.count("baseline")) == CONTENDERS[operation]
        assert "limit" in kinds
        assert len({contender.name for contender in contenders}) == len(contenders)
        for contender in contenders:
            if contender.kind == "limit":
                continue
            check(operation, contender, workload)


def check(operation: str, contender: Contender, workload: Workload) -> None:
    prepared = contender.prepare(workload)
    # What is kept between runs must not change a later one's result; a merge adds dW once more.
    for _ in range(1 if operation == "merge" else 2):
        outcome = contender.outcome(prepared.run())
        CHECKS[operation](outcome, workload.by_module()[0], workload, contender.name)
        prepared.clean()


@pytest.mark.parametrize("case", [UNEVEN, MANY_ROWS], ids=lambda case: case.name)
@pytest.mark.parametrize("operation", ["stack", "reconstruct", "svd", "redistribute", "update_gram"])
def test_baselines_do_every_module(operation: str, case: Case, seed: int) -> None:
    """Not the one alone whose error is reported; and every client's hand-out."""
    workload = drawn(case, seed=seed)
    modules = workload.by_module()
    for contender in OPERATIONS[operation].contenders(workload):
        if contender.kind != "baseline" or contender.one_module:
            continue
        results = contender.prepare(workload).run()
        if operation == "redistribute":
            # All modules of a bucket are given the first one's vectors.
            firsts = [b.module(0) for b in workload.buckets for _ in range(b.modules)]
            for module, handouts in zip(firsts, results, strict=True):
                for found, A in zip(handouts, module.As, strict=True):
                    check_handout(found, module, A.shape[0], workload.dtype)
            continue
        for module, found in zip(modules, results, strict=True):
            CHECKS[operation](found, module, workload, contender.name)


@pytest.mark.parametrize("operation", ["reconstruct", "svd", "update_gram"])
def test_ours_does_every_module(operation: str, seed: int) -> None:
    workload = drawn(UNEVEN, seed=seed)
    modules = workload.by_module()
    for contender in OPERATIONS[operation].contenders(workload):
        if contender.kind != "fastagg":
            continue
        found = contender.prepare(workload).run()
        if operation == "svd":
            each = [(d.U[i] * d.S[i], d.Vt[i]) for d in found for i in range(d.U.shape[0])]
        else:
            each = [result for bucket in found for result in bucket]
        for module, one in zip(modules, each, strict=True):
            CHECKS[operation](one, module, workload, contender.name)


def test_ours_hands_out_every_client(seed: int, tmp_path: Path) -> None:
    """clients.json names a folder for each, whose ranks are its own."""
    workload = drawn(MANY_ROWS, seed=seed, dtype=torch.bfloat16)
    contender = OPERATIONS["end-to-end"].contenders(workload)[0]
    prepared = contender.prepare(workload)
    folder = prepared.run()
    assert (folder.parents[0] / "clients.json").exists()
    found = {
        tuple(load_file(path)[f"base_model.model.model.{b.names[0]}.lora_A.weight"].shape[0]
              for b in workload.buckets)
        for path in folder.parent.rglob("adapter_model.safetensors")
    }  # fmt: skip
    assert found == {tuple(b.ranks[k] for b in workload.buckets) for k in range(MANY_ROWS.clients)}
    prepared.clean()
    assert not folder.exists()


def operands(prepared: Prepared) -> dict[str, torch.Tensor]:
    return dict(inspect.getclosurevars(prepared.run).nonlocals)


@pytest.mark.parametrize("operation", ["stack", "merge", "redistribute"])
def test_the_copy_copies_as_many_bytes_as_are_counted(operation: str, seed: int) -> None:
    workload = drawn(UNEVEN, seed=seed, dtype=torch.bfloat16)
    contenders = OPERATIONS[operation].contenders(workload)
    own = next(c for c in contenders if c.kind == "fastagg")
    copy = next(c for c in contenders if c.name == "memory copy")
    prepared = copy.prepare(workload)
    source, target = (operands(prepared)[name] for name in ("source", "target"))
    assert not torch.equal(source, target)
    assert prepared.run() is target
    assert torch.equal(source, target)
    assert source.data_ptr() != target.data_ptr()
    assert source.nbytes + target.nbytes == pytest.approx(own.work(workload).bytes, abs=8)


@pytest.mark.parametrize(
    ("limit", "dtype"), [(product_limit, torch.float32), (wide_product_limit, torch.float64)]
)
def test_the_product_multiplies_as_much_as_is_counted(limit: Any, dtype: torch.dtype, seed: int) -> None:
    workload = drawn(UNEVEN, seed=seed, dtype=torch.bfloat16).smallest()
    contender = limit(lambda b: (b.m, b.rows, b.n))
    prepared = contender.prepare(workload)
    x, y = (operands(prepared)[name] for name in "xy")
    found = prepared.run()
    assert {x.dtype, y.dtype, found.dtype} == {dtype}
    assert off(found, x.double() @ y.double()) < 1e-6
    assert (x.shape, y.shape) == ((24, 10), (10, 16))
    work = contender.work(workload)
    flops = 2.0 * 24 * 10 * 16
    assert (work.flops, work.wide_flops) == ((flops, 0) if dtype == torch.float32 else (0, flops))


def test_the_library_reconstructs_every_module(seed: int) -> None:
    """reconstruct's limit does all that the op does."""
    workload = drawn(UNEVEN, seed=seed)
    limits = [c for c in OPERATIONS["reconstruct"].contenders(workload) if c.kind == "limit"]
    found = limits[0].prepare(workload).run()
    for module, one in zip(workload.by_module(), found, strict=True):
        assert off(one, dense(module)) < 1e-6


def test_the_sum_of_parts_writes_what_ours_writes(seed: int) -> None:
    """The same bytes of tensors: the limit is no lighter than the work."""
    workload = drawn(MANY_ROWS, seed=seed, dtype=torch.bfloat16)
    contenders = OPERATIONS["end-to-end"].contenders(workload)
    own, parts = contenders[0], contenders[-1]
    run = own.prepare(workload)
    ours = [load_file(path) for path in run.run().parent.rglob("adapter_model.safetensors")]
    limit = parts.prepare(workload)
    limit.run()
    root = operands(limit)["outputs"].root
    written = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    assert written == sum(t.nbytes for tensors in ours for t in tensors.values())


def test_counted_work(seed: int) -> None:
    """What is read and written once, from the sizes of the tensors; products from their shapes."""
    workload = drawn(UNEVEN, seed=seed, dtype=torch.bfloat16)
    modules = workload.by_module()
    read = sum(t.nbytes for module in modules for t in (*module.As, *module.Bs))
    entries = sum(t.numel() for module in modules for t in (*module.As, *module.Bs))
    dense_entries = sum(dense(module).numel() for module in modules)
    products = sum(
        2.0 * B.shape[0] * B.shape[1] * A.shape[1]
        for mod in modules
        for A, B in zip(mod.As, mod.Bs, strict=True)
    )

    def work(operation: str) -> tuple[float, float, float]:
        found = OPERATIONS[operation].contenders(workload)[0].work(workload)
        return found.bytes, found.flops, found.wide_flops

    assert read == workload.nbytes
    assert work("stack") == (read + 4 * entries, 0, 0)
    assert work("reconstruct") == (read + 4 * dense_entries, products, 0)
    assert work("merge") == (read + 2 * 2 * dense_entries, products, 0)
    grams = sum(float(mod.reference()[0].shape[0]) ** 2 * sum(dense(mod).shape) for mod in modules)
    assert work("update_gram") == (read + 8 * 3**2 * len(modules), 0, grams)
    decomposed = sum(4 * 6 * sum(dense(mod).shape) for mod in modules)
    assert work("redistribute") == (read + decomposed, 0, 0)


def needs_a_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"torch.compile: {error}")


@pytest.mark.parametrize("operation", ["stack", "merge", "redistribute"])
def test_compiled_baselines_are_measured_like_all_others(operation: str, seed: int) -> None:
    """They find what the others find, and the time of compiling is not theirs: they are run again and
    again, as what is as quick as they are is."""
    needs_a_compiler()
    case = replace(UNEVEN, layers=1, projections=UNEVEN.projections[:1])
    effort = Effort(2, 0.001, 0.5, 60.0, 1 << 24, compile=True)
    found = measure(
        OPERATIONS[operation],
        case,
        clock=CpuClock(CPU, 1, effort.turn_seconds),
        effort=effort,
        dtype=torch.float32,
        factors="random",
        seed=seed,
        flops_per_second=1e9,
    )
    assert found.left_out == []
    compiled = [row for row in found.rows if row.contender.startswith("torch.compile of ")]
    assert len(compiled) == 1
    assert compiled[0].turns > 1
    assert compiled[0].error is not None
    assert compiled[0].error < 1e-5
