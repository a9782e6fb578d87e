"""Hostile and broken folders: one clear error each, naming the client and the cure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_folder, make_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastagg.adapter import Adapter
from fastagg.errors import FastAggError, InvalidInput
from fastagg.update import ClientUpdate

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q = "model.layers.0.self_attn.q_proj"


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def emptied(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def lying(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A folder whose header was changed; its data stay."""

    def apply(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])

    return apply


def tensor(header: dict[str, Any]) -> dict[str, Any]:
    entry = header[f"base_model.model.{Q}.lora_A.weight"]
    assert isinstance(entry, dict)
    return entry


def config(**fields: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**raw, **fields}))

    return apply


def config_text(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_bytes(text) and None


def without(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = make_state_dict()
        change(state)
        save_file(state, folder / WEIGHTS)

    return apply


def pickled(folder: Path) -> None:
    torch.save(make_state_dict(), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def nested(folder: Path) -> None:
    (folder / "default").mkdir()
    for name in (WEIGHTS, CONFIG):
        (folder / name).rename(folder / "default" / name)


def a_folder_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


A = f"base_model.model.{Q}.lora_A.weight"
B = f"base_model.model.{Q}.lora_B.weight"

BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, "does not describe its data"),
    "empty file": (emptied, "cut off"),
    "offsets outside": (lying(lambda h: tensor(h).update(data_offsets=[0, 1 << 40])), "describe"),
    "offsets negative": (lying(lambda h: tensor(h).update(data_offsets=[-4, 508])), "describe"),
    "offsets overlap": (lying(lambda h: tensor(h).update(data_offsets=[512, 1024])), "describe"),
    "shape huge": (lying(lambda h: tensor(h).update(shape=[1 << 62, 16])), "describe"),
    "shape wrong": (lying(lambda h: tensor(h).update(shape=[8, 17])), "describe"),
    "dtype wrong": (lying(lambda h: tensor(h).update(dtype="F16")), "describe"),
    "dtype unknown": (lying(lambda h: tensor(h).update(dtype="F33")), "describe"),
    "same size, other dtype": (
        lying(lambda h: tensor(h).update(dtype="I32")),
        "dtype that cannot be aggregated",
    ),
    "same size, other shape": (lying(lambda h: tensor(h).update(shape=[16, 8])), "rank"),
    "a tensor taken out": (lying(lambda h: h.pop(A)), "describe"),
    "no config": (without(CONFIG), f"no {CONFIG}"),
    "no weights": (without(WEIGHTS), f"no {WEIGHTS}"),
    "nothing": (without(WEIGHTS, CONFIG), f"no {CONFIG}"),
    "no folder": (removed, "there is no folder"),
    "subfolder": (nested, "subfolder 'default'"),
    "pickle": (pickled, "pickle"),
    "weights are a folder": (a_folder_instead, f"no {WEIGHTS}"),
    "config empty": (config_text(b""), "not JSON"),
    "config cut": (config_text(b'{"peft_type": "LO'), "not JSON"),
    "config binary": (config_text(b"\xff\xfe\x00"), "not JSON"),
    "config deep": (config_text(b"[" * 200_000), "not JSON"),
    "config list": (config_text(b"[]"), "not an object"),
    "config of another type": (config(peft_type="LOHA"), "not a LoRA adapter"),
    "config without a type": (config_text(b'{"r": 8}'), "not a LoRA adapter"),
    "config of DoRA": (config(use_dora=True), "DoRA"),
    "rank contradicts": (config(r=4), "contradicts the configuration"),
    "rank zero": (config(r=0), "not a rank"),
    "rank_pattern contradicts": (config(rank_pattern={"q_proj": 3}), "contradicts"),
    "alpha NaN": (config(lora_alpha=float("nan")), "not a usable lora_alpha"),
    "A without B": (tensors(lambda s: s.pop(B)), "lora_B is missing"),
    "B without A": (tensors(lambda s: s.pop(A)), "lora_A is missing"),
    "ranks of A and B differ": (tensors(lambda s: s.update({B: torch.ones(24, 7)})), "ranks"),
    "no LoRA module": (
        tensors(lambda s: (s.clear(), s.update({"classifier.weight": torch.ones(2, 2)}))),
        "no LoRA module",
    ),
    "no tensor": (tensors(lambda s: s.clear()), "no LoRA module"),
    "zero rank": (
        tensors(lambda s: s.update({A: torch.ones(0, 16), B: torch.ones(24, 0)})),
        "a factor is empty",
    ),
    "float64": (tensors(lambda s: s.update({A: s[A].double()})), "Cast it to float32"),
    "NaN": (tensors(lambda s: s[A].fill_(float("nan"))), "128 of 128 values are NaN"),
    "infinity": (tensors(lambda s: s[B][0, 0].fill_(float("inf"))), "1 of 192 values are NaN"),
    "magnitudes": (
        tensors(lambda s: s.update({f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(24)})),
        "DoRA",
    ),
}
IN_A_MODULE = {
    "A without B",
    "B without A",
    "ranks of A and B differ",
    "zero rank",
    "NaN",
    "infinity",
    "rank contradicts",
    "rank_pattern contradicts",
    "same size, other shape",
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_folder_is_refused_with_its_name_and_a_cure(name: str, tmp_path: Path) -> None:
    damage, expected = BAD[name]
    folder = make_folder(tmp_path / "client-7")
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput) as caught:
        ClientUpdate(folder, 3).validate()
    error = caught.value
    assert isinstance(error, FastAggError)
    assert isinstance(error, ValueError)
    assert expected in str(error)
    assert error.client == "client-7"
    assert "client-7" in str(error)
    assert error.cure or error.expected is not None
    if name in IN_A_MODULE:
        assert error.module is not None
        assert error.module in str(error)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_that_may_not_be_read(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "client-7")
    (folder / name).chmod(0)
    with pytest.raises(InvalidInput, match="Permission denied") as caught:
        Adapter.load(folder)
    assert caught.value.client == "client-7"


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "client-7")
    with pytest.raises(InvalidInput, match="is not a folder"):
        Adapter.load(folder / WEIGHTS)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "client-7")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    (folder / "adapter_model.bin").chmod(0)
    with pytest.raises(InvalidInput, match="may run code") as caught:
        Adapter.load(folder)
    assert "safe_serialization=True" in str(caught.value)


def test_a_pickle_beside_the_safetensors_file_is_ignored(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "client-7")
    (folder / "training_args.bin").write_bytes(b"\x80\x02garbage")
    assert Adapter.load(folder).modules


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_refused_or_harmless(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = make_folder(tmp_path_factory.getbasetemp() / "any-damage", rank=2)
    name = data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    raw = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    kept = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    (folder / name).write_bytes(raw[:kept])
    try:
        update = ClientUpdate(folder)
        update.validate()
    except InvalidInput:
        return
    assert all(value.isfinite().all() for value in update.adapter.state_dict().values())
