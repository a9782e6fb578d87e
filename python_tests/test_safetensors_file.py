"""Mapped safetensors files, against the safetensors library."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastagg.errors import InvalidInput
from fastagg.peft_format.safetensors_file import MappedFile, MappedWriter, map_file, view

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.full((1, 5), 0.5, dtype=torch.float16),
    "d": torch.zeros(0, 4),
    "e": torch.tensor(3, dtype=torch.int64),
}


def write_raw(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path: Path) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        map_file(path, client="c7")
    assert caught.value.client == "c7"
    assert str(path) in str(caught.value)
    assert caught.value.cure
    return caught.value


def test_maps_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    flat, spans = map_file(tmp_path / "x.safetensors")
    assert flat.dtype == torch.uint8
    assert flat.dim() == 1
    assert spans.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        got = view(flat, spans[key])
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        assert torch.equal(got, tensor)


def test_writing_into_the_mapping_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    before = path.read_bytes()
    flat, spans = map_file(path)
    view(flat, spans["a"]).fill_(9)
    assert path.read_bytes() == before
    assert torch.equal(load_file(path)["a"], TENSORS["a"])


def test_mapping_reads_nothing_and_keeps_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1 << 24)}, path)  # 64 MiB
    process = psutil.Process()
    map_file(path)
    descriptors, before = process.num_fds(), process.memory_info().rss
    held = [map_file(path) for _ in range(20)]
    assert process.num_fds() == descriptors
    assert process.memory_info().rss - before < 8 << 20
    assert len(held) == 20


def test_more_files_than_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = psutil.Process().num_fds() + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        held = [map_file(path) for _ in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(held) == 100


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 60, -1, -4])
def test_a_file_that_was_cut_off(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    refused(path)


def test_bytes_behind_the_data(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes() + b"\0" * 4)
    refused(path)


LIES: dict[str, tuple[object, bytes]] = {
    "outside": ({"a": entry(0, 32, [8])}, bytes(16)),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "same": ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8)),
    "gap": ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20)),
    "late": ({"a": entry(4, 12, [2])}, bytes(12)),
    "negative": ({"a": entry(-8, 0, [2])}, bytes(8)),
    "backwards": ({"a": entry(8, 0, [2])}, bytes(8)),
    "huge": ({"a": entry(0, 1 << 62, [1 << 60])}, bytes(16)),
    "overflow": ({"a": entry(0, 8, [1 << 62, 1 << 62])}, bytes(8)),
    "beyond int64": ({"a": entry(0, 1 << 70, [2])}, bytes(8)),
    "shape": ({"a": entry(0, 8, [3])}, bytes(8)),
    "negative shape": ({"a": entry(0, 8, [-1, -2])}, bytes(8)),
    "dtype": ({"a": entry(0, 8, [2], "F33")}, bytes(8)),
    "wrong dtype": ({"a": entry(0, 8, [2], "F16")}, bytes(8)),
    "fraction": ({"a": entry(0, 8, [2.0])}, bytes(8)),  # type: ignore[list-item]
    "text": ({"a": entry("0", 8, [2])}, bytes(8)),  # type: ignore[arg-type]
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "list": ([1, 2], bytes(8)),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 1
        + b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "not JSON": (b"{'a': 1}", bytes(8)),
    "not UTF-8": (b'{"\xff":1}', bytes(8)),
    "deep": (b"[" * 100_000, bytes(8)),
    "empty": (b"", b""),
    "metadata": ({"__metadata__": {"a": 1}}, b""),
}


@pytest.mark.parametrize("name", sorted(LIES))
def test_a_header_that_lies(tmp_path: Path, name: str) -> None:
    header, data = LIES[name]
    refused(write_raw(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_length_that_lies(tmp_path: Path, length: int) -> None:
    header = {"a": entry(0, 8, [2])}
    refused(write_raw(tmp_path / "x.safetensors", header, bytes(8), length))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_refused_or_harmless(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file(TENSORS, path)
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        flat, spans = map_file(path)
    except InvalidInput:
        return
    assert sum(span.nbytes for span in spans.values()) == flat.numel()
    for span in spans.values():
        assert view(flat, span).shape == span.shape


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path)
    refused(tmp_path / "absent.safetensors")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe")


def test_tensors_need_not_be_aligned(tmp_path: Path) -> None:
    header = json.dumps({"h": entry(0, 2, [1], "F16"), "f": entry(2, 10, [2])})
    header += " " * (7 - len(header) % 8)
    data = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8).tolist()
    data += torch.tensor([1.0, -2.0]).view(torch.uint8).tolist()
    path = write_raw(tmp_path / "x.safetensors", header.encode(), bytes(data))
    file = MappedFile.open(path)
    assert not file.aligned
    assert view(file.flat, file.spans["f"]).tolist() == [1.0, -2.0]
    assert view(file.flat, file.spans["h"]).tolist() == [0.5]


def test_a_replaced_file_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    file = MappedFile.open(path)
    save_file({"a": torch.zeros(10)}, tmp_path / "y.safetensors")
    os.replace(tmp_path / "y.safetensors", path)
    file.check_unchanged()
    assert view(file.flat, file.spans["a"]).sum() == 1000
    path.unlink()
    file.check_unchanged()


def test_a_file_rewritten_in_place_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    file = MappedFile.open(path, client="c7")
    with path.open("r+b") as handle:
        handle.truncate(100)
    with pytest.raises(InvalidInput, match="rewritten while it was in use") as caught:
        file.check_unchanged("c7")
    assert caught.value.client == "c7"


def test_a_file_that_changes_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    original = torch.from_file

    def meddling(*args: Any, **options: Any) -> torch.Tensor:
        mapped = original(*args, **options)
        save_file({"a": torch.zeros(10)}, tmp_path / "y")
        os.replace(tmp_path / "y", path)
        return mapped

    monkeypatch.setattr(torch, "from_file", meddling)
    assert "changed while it was being opened" in refused(path).problem


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
shapes = st.lists(st.integers(0, 5), max_size=3)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
            lambda key: key != "__metadata__"
        ),
        st.tuples(dtypes, shapes),
        max_size=6,
    ),
    st.sampled_from([None, {"format": "pt"}, {"ü": '"\\'}]),
)
@settings(max_examples=60, deadline=None)
def test_the_library_reads_what_the_writer_wrote(
    tmp_path_factory: Any, entries: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    path.unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(len(entries))
    wanted = {}
    with MappedWriter.create(path, entries, metadata) as writer:
        for key, (dtype, shape) in entries.items():
            size = int(torch.empty(shape, dtype=dtype).nbytes)
            high = 2 if dtype == torch.bool else 256
            data = torch.randint(high, (size,), dtype=torch.uint8, generator=generator)
            wanted[key] = data
            target = writer.tensor(key)
            if size:
                target.view(-1).view(torch.uint8).copy_(data)
    with safe_open(path, framework="pt") as read:
        assert set(read.keys()) == set(entries)
        assert read.metadata() == metadata
        for key, (dtype, shape) in entries.items():
            tensor = read.get_tensor(key)
            assert tensor.dtype == dtype
            assert list(tensor.shape) == shape
            assert torch.equal(tensor.contiguous().view(-1).view(torch.uint8), wanted[key])


def test_the_written_data_starts_aligned(tmp_path: Path) -> None:
    for length in range(1, 70):
        path = tmp_path / f"{length}.safetensors"
        with MappedWriter.create(path, {"k" * length: (torch.float32, [1])}) as writer:
            writer.tensor("k" * length).fill_(2)
        raw = path.read_bytes()
        assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        MappedWriter.create(tmp_path / "x", {"a": (torch.float32, [1])})
    assert (tmp_path / "x").read_text() == "mine"


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    entries = {"a": (torch.uint8, [1 << 20])}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            MappedWriter.create(tmp_path / "x", entries)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
