"""Hand-outs on disk: what is written, that PEFT loads it, and that it is all or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from equations import (
    EMBEDDING,
    SAVED,
    SHAPES,
    Client,
    client,
    exact,
    mixed_round,
    one_thread,  # noqa: F401
    optimal_error,
)
from safetensors.torch import load_file

import fastagg
from fastagg import Adapter
from fastagg.errors import InvalidInput
from fastagg.report import Report


def run(clients: list[Client], method: str = "flexlora", **options: object) -> fastagg.Aggregate:
    return fastagg.aggregate([each.update for each in clients], method, **options)  # type: ignore[arg-type]


def read(folder: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / name).read_text())
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["flexlora", "zeropad", "hetlora"])
@pytest.mark.parametrize("accumulator", ["auto", "dense"])
def test_every_client_finds_its_adapter(
    seed: int, tmp_path: Path, method: str, accumulator: str
) -> None:
    if method != "flexlora" and accumulator == "dense":
        pytest.skip("an accumulator of flexlora")
    clients = mixed_round(seed, (torch.float32, torch.bfloat16))
    result = run(clients, method, accumulator=accumulator)
    result.save(tmp_path / "out")
    places = read(tmp_path / "out", "clients.json")
    assert list(places) == [each.name for each in clients]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *places.values(), "clients.json", "report.json"
    }
    for each in clients:
        written = Adapter.load(tmp_path / "out" / str(places[each.name]))
        expected = result.adapter(client=each.name)
        assert written.modules == expected.modules
        assert written.config == each.adapter.config
        for key, tensor in expected.state_dict().items():
            assert torch.equal(written.state_dict()[key], tensor)
            assert written.state_dict()[key].dtype == tensor.dtype


def test_folders_are_shared_by_clients_of_one_signature(seed: int, tmp_path: Path) -> None:
    some = dict(list(SHAPES.items())[:3])
    pattern = {"q_proj": 4}
    clients = [
        client("a", 8, seed=seed),
        client("b", 8, seed=seed + 1, weight=9),
        client("scaling", 8, seed=seed + 2, alpha=1.0),
        client("dtype", 8, seed=seed + 3, dtype=torch.bfloat16),
        client("modules", 8, seed=seed + 4, modules=some),
        client("saved", 8, seed=seed + 5, saved=True),
        client("pattern", 64, seed=seed + 6, rank_pattern=pattern),
        client("small", 2, seed=seed + 7),
        client("prefix", 8, seed=seed + 8, prefix="model.base_model.model."),
    ]
    run(clients).save(tmp_path / "out")
    places = read(tmp_path / "out", "clients.json")
    assert places["a"] == places["b"] == places["prefix"] == "rank-8"
    assert places["pattern"] == "rank-4-64"
    assert places["small"] == "rank-2"
    rest = [places[name] for name in ("scaling", "dtype", "modules", "saved")]
    assert len({*rest, "rank-8"}) == 5
    assert all(str(place).startswith("rank-8-v") for place in rest)
    written = load_file(tmp_path / "out" / "rank-8" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers") for key in written)


def test_flora_writes_one_stack(seed: int, tmp_path: Path) -> None:
    clients = mixed_round(seed)
    result = run(clients, "flora")
    result.save(tmp_path / "out")
    assert set(files(tmp_path / "out")) == {
        "clients.json", "report.json", "stacked/adapter_config.json",
        "stacked/adapter_model.safetensors",
    }
    assert set(read(tmp_path / "out", "clients.json").values()) == {"stacked"}
    stack = Adapter.load(tmp_path / "out" / "stacked")
    assert torch.equal(stack.flat, result.stacked().flat)


@pytest.mark.parametrize("ranks", [[4, 16], [16, 4, 4], (3,), range(1, 4)])
def test_other_ranks(seed: int, tmp_path: Path, ranks: list[int]) -> None:
    clients = mixed_round(seed)
    result = run(clients)
    result.save(tmp_path / "out", ranks=ranks)
    listed = sorted(set(ranks))
    for rank in listed:
        written = Adapter.load(tmp_path / "out" / f"rank-{rank}")
        if max(listed) <= 8:  # no module needs a wider decomposition than its own clients do
            assert torch.equal(written.flat, result.adapter(rank=rank).flat)
        for module in written.modules:
            dw, (a, b) = exact(clients, module), written.factors(module)
            error = (written.scaling(module) * b.double() @ a.double() - dw).norm()
            assert error <= optimal_error(dw, rank) + 2e-6 * dw.norm()
    places = read(tmp_path / "out", "clients.json")
    for each in clients:
        own = max(each.adapter.rank(module) for module in each.modules)
        fitting = [rank for rank in listed if rank <= own]
        assert places[each.name] == f"rank-{fitting[-1] if fitting else listed[0]}"


@pytest.mark.parametrize(("method", "ranks", "message"), [
    ("flora", [4], "flexlora"), ("fedit", [2], "zeropad"), ("flexlora", [], "no rank"),
    ("flexlora", [0], "not a rank"), ("flexlora", ["4"], "not a rank"),
])
def test_ranks_that_cannot_be_handed_out(
    seed: int, tmp_path: Path, method: str, ranks: list[int], message: str
) -> None:
    result = run([client(f"c{k}", 8, seed=seed + k) for k in range(2)], method)
    with pytest.raises(InvalidInput, match=message):
        result.save(tmp_path / "out", ranks=ranks)
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_written(seed: int, tmp_path: Path) -> None:
    clients = mixed_round(seed)
    result = run(clients)
    result.save(tmp_path / "out")
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert report == result.report
    places = read(tmp_path / "out", "clients.json")
    assert {each.client: each.handout for each in report.clients} == places
    for each in report.clients:
        path = tmp_path / "out" / str(each.handout) / "adapter_model.safetensors"
        assert 0 < path.stat().st_size - each.handout_bytes < 20_000
    sizes = {name: len(data) for name, data in files(tmp_path / "out").items()}
    assert report.bytes_written == sum(sizes.values()) - sizes["report.json"]
    assert report.whole_tensors == [SAVED]
    assert all(module.route for module in report.modules)
    assert all(report.seconds[stage] > 0 for stage in
               ("validate", "fold", "stack", "svd", "redistribute", "write"))


def test_modules_are_written_some_at_a_time(seed: int, tmp_path: Path) -> None:
    clients = mixed_round(seed)
    run(clients).save(tmp_path / "whole")
    result = run(clients)
    result._writer.limit = 1
    steps = []
    result.save(tmp_path / "parts", progress=lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(k + 1, 8) for k in range(8)]
    assert {step[2] for step in steps} == set(result.modules)
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    del whole["report.json"], parts["report.json"]
    assert whole == parts


def test_many_targets_are_written_some_at_a_time(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [client(f"c{k}", 3 + k, seed=seed + k) for k in range(6)]
    result = run(clients)
    result.save(tmp_path / "together")
    calls = []
    real = fastagg.ops.redistribute_
    monkeypatch.setattr("fastagg.ops.redistribute_", lambda *a: (calls.append(a[0]), real(*a)))
    result._writer.limit = 1
    result.save(tmp_path / "apart")
    assert len(calls) > len(result.modules)
    together, apart = files(tmp_path / "together"), files(tmp_path / "apart")
    del together["report.json"], apart["report.json"]
    assert together == apart


# All or nothing


def test_what_exists_is_refused_without_force(seed: int, tmp_path: Path) -> None:
    result = run([client("a", seed=seed)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(InvalidInput, match="force"):
        result.save(tmp_path / "out")
    assert files(tmp_path) == {"out/precious": b"mine"}
    result.save(tmp_path / "out", force=True)
    assert "out/precious" not in files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidInput):
        result.save(tmp_path / "file", force=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("replacing", [False, True])
def test_an_interruption_leaves_nothing(
    seed: int, tmp_path: Path, error: type[BaseException], replacing: bool
) -> None:
    clients = mixed_round(seed)
    result = run(clients)
    result._writer.limit = 1
    if replacing:
        result.save(tmp_path / "out")
    before = files(tmp_path)

    def interrupts(done: int, total: int, what: str) -> None:
        if done == 5:
            raise error

    with pytest.raises(error):
        result.save(tmp_path / "out", force=True, progress=interrupts)
    assert files(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == replacing
    result.save(tmp_path / "out", force=True)
    assert read(tmp_path / "out", "clients.json")


def test_no_descriptor_stays_open(seed: int, tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    result = run(mixed_round(seed))
    result.save(tmp_path / "warm")
    before = len(os.listdir("/proc/self/fd"))
    result.save(tmp_path / "out")

    def interrupts(*_: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        result.save(tmp_path / "out2", progress=interrupts)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_number_that_does_not_fit_leaves_nothing(seed: int, tmp_path: Path) -> None:
    big = client("big", 4, seed=seed)
    for tensor in big.adapter.state_dict().values():
        tensor.mul_(1000)
    with pytest.raises(InvalidInput, match="float16"):
        run([big], dtype=torch.float16).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_out_before_any_work(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run([client("a", seed=seed)])
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(fastagg.FastAggError, match="left"):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# With PEFT itself


def test_peft_loads_every_folder_and_computes_the_delta(seed: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from test_handouts import Model

    torch.manual_seed(seed)
    clients = mixed_round(seed)
    for method in ("flexlora", "flora"):
        result = run(clients, method)
        result.save(tmp_path / method)
        for name in set(read(tmp_path / method, "clients.json").values()):
            folder = tmp_path / method / str(name)
            written, base = Adapter.load(folder), Model()
            before = {key: value.clone() for key, value in base.state_dict().items()}
            model = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
            after = model.state_dict()
            for module in written.modules:
                a, b = (factor.double() for factor in written.factors(module))
                delta = written.scaling(module) * b @ a
                if method == "flora":
                    delta = exact(clients, module)
                delta = delta.T if module == EMBEDDING else delta
                weight = f"{module}.weight"
                got = (after[weight].double() - before[weight].double()).reshape(delta.shape)
                assert (got - delta).norm() <= 1e-5 * max(1.0, float(delta.norm())), module


def test_as_many_files_as_clients_hold_no_descriptors(seed: int, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    shapes = {"q": (4, 4)}
    clients = [client(f"c{k}", 1, alpha=1.0 + k, seed=seed + k, modules=shapes) for k in range(90)]
    result = run(clients)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    assert in_use < 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, hard))
    try:
        result.save(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list((tmp_path / "out").glob("*/adapter_model.safetensors"))) == 90


def test_every_folder_made_is_brought_to_the_disk(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, int]] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_dev, status.st_ino))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    run(mixed_round(seed)).save(tmp_path / "a" / "b" / "out")
    made = [tmp_path, *(path for path in tmp_path.rglob("*"))]
    assert len(made) > 8
    for path in made:
        assert (path.stat().st_dev, path.stat().st_ino) in synced, path
