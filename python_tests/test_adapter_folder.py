"""Adapters to and from folders: equal bits, all or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from adapters import make_adapter, make_config, make_folder, make_state_dict, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput

modules = st.dictionaries(
    st.lists(st.sampled_from(["layers", "0", "1", "q_proj", "h", "lora"]), min_size=1).map(".".join),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    min_size=1,
    max_size=5,
)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(
    modules,
    st.integers(1, 12),
    dtypes,
    dtypes,
    st.sampled_from(["base_model.model.", "model.base_model.model.", ""]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_saved_and_loaded_bits_are_equal(
    tmp_path_factory: Any,
    modules: dict[str, tuple[int, int]],
    rank: int,
    dtype: torch.dtype,
    other: torch.dtype,
    prefix: str,
    seed: int,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "round-trip"
    state = make_state_dict(modules, rank, dtype, seed, prefix=prefix)
    first = next(iter(state))
    bits = torch.randint(
        256,
        (state[first].numel() * other.itemsize,),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    state[first] = bits.view(other).view(state[first].shape)  # NaN payloads included
    adapter = Adapter(state, make_config(modules, rank), name="c7")
    assert same_bits(adapter.state_dict(), state)
    adapter.save(folder, overwrite=True)
    loaded = Adapter.load(folder)
    canonical = {"base_model.model." + key.removeprefix(prefix): value for key, value in state.items()}
    assert same_bits(loaded.state_dict(), canonical)
    assert same_bits(load_file(folder / "adapter_model.safetensors"), canonical)
    assert loaded.modules == adapter.modules == tuple(sorted(modules))
    assert loaded.config == adapter.config
    assert (
        loaded.dtype == adapter.dtype == (dtype if dtype == other else torch.promote_types(dtype, other))
    )


def test_loading_reads_the_header_only(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "big", {"a.q": (1 << 20, 16)}, rank=16)
    process = psutil.Process()
    Adapter.load(folder)
    before = process.memory_info().rss
    held = [Adapter.load(folder) for _ in range(10)]
    assert process.memory_info().rss - before < 8 << 20
    assert held[0].nbytes > 64 << 20


def test_unaligned_files_are_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "c7")
    path = folder / "adapter_model.safetensors"
    aligned = {key: tensor.clone() for key, tensor in load_file(path).items()}
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    path.write_bytes((size + 3).to_bytes(8, "little") + raw[8 : 8 + size] + b"   " + raw[8 + size :])
    adapter = Adapter.load(folder)
    assert same_bits(adapter.state_dict(), aligned)
    assert adapter.flat.data_ptr() % 16 == 0
    adapter.check_finite()


def test_a_file_rewritten_in_place_is_noticed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "c7")
    adapter = Adapter.load(folder)
    save_file({"a": torch.ones(2)}, folder / "other")
    (folder / "adapter_model.safetensors").write_bytes((folder / "other").read_bytes())
    with pytest.raises(InvalidInput, match="rewritten while it was in use"):
        adapter.check_finite()


def test_the_folders_name_is_the_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "clients" / "7")
    assert Adapter.load(tmp_path / "clients" / "7").name == "7"
    assert Adapter.load(f"{tmp_path}/clients/7/").name == "7"
    monkeypatch.chdir(tmp_path / "clients" / "7")
    assert Adapter.load(".").name == "7"


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    make_adapter(seed=1).save(target)
    (target / "note").write_text("mine")
    with pytest.raises(InvalidInput, match="overwrite=True"):
        make_adapter(seed=2).save(target)
    assert same_bits(Adapter.load(target).state_dict(), make_state_dict(seed=1))
    assert (target / "note").exists()
    make_adapter(seed=2).save(target, overwrite=True)
    assert same_bits(Adapter.load(target).state_dict(), make_state_dict(seed=2))
    assert sorted(os.listdir(target)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_may_be_saved_over_its_own_source(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "c7", seed=3)
    adapter = Adapter.load(folder)
    adapter.save(folder, overwrite=True)
    assert same_bits(Adapter.load(folder).state_dict(), make_state_dict(seed=3))
    assert same_bits(adapter.state_dict(), make_state_dict(seed=3))


def test_a_file_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InvalidInput, match="not a folder"):
        make_adapter().save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_of_a_failed_save(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "out"
    if overwrite:
        make_adapter(seed=1).save(target)
    with limited_files(2000), pytest.raises(OSError, match="File too large"):
        make_adapter(seed=2).save(target, overwrite=overwrite)
    assert os.listdir(tmp_path) == (["out"] if overwrite else [])
    if overwrite:
        assert same_bits(Adapter.load(target).state_dict(), make_state_dict(seed=1))


def test_the_saved_config_is_the_clients(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", config_extra={"note": "kept", "use_dora": False})
    Adapter.load(folder).save(tmp_path / "out")
    before, after = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("in", "out")
    )
    assert before == after
