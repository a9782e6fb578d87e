"""A transformers checkpoint on disk: its shards, its index, and the files that go with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastagg.errors import InvalidInput
from fastagg.peft_format.layout import TensorSpan
from fastagg.peft_format.safetensors_file import MappedFile

_INDEX = ".safetensors.index.json"
_CONFIG = "config.json"
# Weights in other formats would be those of the base model, unmerged: not to be handed on.
_OTHER_WEIGHTS = (
    ".bin", ".bin.index.json", ".ckpt", ".gguf", ".h5", ".msgpack", ".msgpack.index.json", ".onnx",
    ".ot", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", _INDEX,
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model folder, their headers read and their data mapped.

    Attributes:
        folder: the model folder.
        shards: file name -> the mapped file, in the order of the names.
        where: tensor name -> file name.
        index: the index's file name, None for a single file.
        config: config.json, empty where there is none.
    """

    folder: Path
    shards: Mapping[str, MappedFile]
    where: Mapping[str, str]
    index: str | None
    config: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Map a model folder; costs its headers, whatever its size.

        Raises:
            InvalidInput: no folder, no safetensors files, a shard that is missing or damaged, or an
                index that does not describe the shards.
        """
        path = Path(folder)
        if not path.is_dir():
            raise InvalidInput(
                f"{path} is not a folder" if path.exists() else f"there is no folder {path}",
                field="--base",
                expected="a model folder with config.json and safetensors files",
                cure="Give a local folder; `hf download` fetches a model from the hub",
            )
        index, names = _shard_names(path)
        shards = {name: MappedFile.open(path / name) for name in names}
        found: dict[str, str] = {}
        for name, shard in shards.items():
            for key in shard.spans:
                if key in found:
                    raise _bad_index(path, f"tensor {key!r} is in both {found[key]} and {name}")
                found[key] = name
        if index is not None:
            _check_index(path, _weight_map(path, index), found)
        return cls(path, shards, found, index, _read_json(path / _CONFIG, optional=True))

    def span(self, key: str) -> TensorSpan:
        """Where a tensor lies in its shard."""
        return self.shards[self.where[key]].spans[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(span.nbytes for shard in self.shards.values() for span in shard.spans.values())

    def companions(self) -> tuple[list[Path], list[Path]]:
        """The other files of the folder, relative to it: those to copy, and the weights in other
        formats, which are left out. Hidden files and folders are neither."""
        copied: list[Path] = []
        left_out: list[Path] = []
        for path in _walk(self.folder):
            name = path.relative_to(self.folder)
            if str(name) in self.shards or str(name) == self.index:
                continue
            (left_out if path.name.endswith(_OTHER_WEIGHTS) else copied).append(name)
        return copied, left_out

    def write_companions(
        self, folder: Path, added: Mapping[str, str], nbytes: int, untied: bool
    ) -> None:
        """Copy the other files, the index and the configuration into a new folder.

        Args:
            folder: where to.
            added: tensor name -> file name of the tensors the base did not have.
            nbytes: bytes of all tensors of the new folder.
            untied: the output head is no longer the input embedding.
        """
        for name in self.companions()[0]:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, target)
        if self.index is not None:
            self._write_index(folder / self.index, added, nbytes)
        if untied and self.config:
            _write_json(folder / _CONFIG, _without_tie(self.config))

    def _write_index(self, path: Path, added: Mapping[str, str], nbytes: int) -> None:
        if not added:
            shutil.copyfile(self.folder / path.name, path)
            return
        index = dict(_read_json(self.folder / path.name))
        index["weight_map"] = dict(sorted({**index["weight_map"], **added}.items()))
        metadata = {**(index.get("metadata") or {}), "total_size": nbytes}
        metadata.pop("total_parameters", None)
        index["metadata"] = metadata
        _write_json(path, index)


def _shard_names(folder: Path) -> tuple[str | None, list[str]]:
    """The index's file name (None without one) and the shards', in order."""
    indices = sorted(path.name for path in folder.glob(f"*{_INDEX}"))
    single = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(indices) > 1 and f"model{_INDEX}" in indices:
        indices = [f"model{_INDEX}"]
    if len(indices) == 1:
        return indices[0], sorted(set(_weight_map(folder, indices[0]).values()))
    if "model.safetensors" in single:
        single = ["model.safetensors"]
    if len(single) == 1 and not indices:
        return None, single
    if not single:
        raise InvalidInput(
            f"{folder} has no safetensors files",
            field="--base",
            expected="model.safetensors, or shards with model.safetensors.index.json",
            cure="Save the model as safetensors: model.save_pretrained(folder)",
        )
    raise InvalidInput(
        f"{folder} has several safetensors files and no single index that says which are the model",
        field="--base",
        got=", ".join((indices + single)[:4]),
        cure="Keep one model per folder",
    )


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """Tensor name -> file name, as the index has it, every file name a plain one that exists."""
    found = _read_json(folder / index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise _bad_index(folder, f"{index} has no weight_map")
    for key, name in found.items():
        plain = isinstance(name, str) and name == os.path.basename(name)
        if not plain or not name.endswith(".safetensors"):
            raise _bad_index(folder, f"{index} puts {key!r} into {name!r}, no file of the folder")
        if not (folder / name).is_file():
            raise _bad_index(folder, f"the shard {name} that {index} names is missing")
    return found


def _check_index(folder: Path, stated: Mapping[str, str], found: Mapping[str, str]) -> None:
    for key, name in stated.items():
        if found.get(key) != name:
            raise _bad_index(folder, f"the index puts {key!r} into {name}, which does not have it")
    for key, name in found.items():
        if key not in stated:
            raise _bad_index(folder, f"tensor {key!r} of {name} is not in the index")


def _bad_index(folder: Path, problem: str) -> InvalidInput:
    return InvalidInput(f"{folder}: {problem}", field="--base", cure="Download or save the model again")


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{path} cannot be read: {error}", field="--base", cure="Download or save it again"
        ) from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path} is not a JSON object", field="--base")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _without_tie(config: Mapping[str, Any]) -> dict[str, Any]:
    untied = {**config, "tie_word_embeddings": False}
    nested = config.get("text_config")
    if isinstance(nested, dict) and "tie_word_embeddings" in nested:
        untied["text_config"] = {**nested, "tie_word_embeddings": False}
    return untied


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path
