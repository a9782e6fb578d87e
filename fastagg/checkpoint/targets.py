"""What a merge does to each tensor of a checkpoint, decided and checked before any writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import torch

from fastagg.adapter import Adapter
from fastagg.checkpoint.deltas import Delta, check_mergeable, of_adapter, oriented
from fastagg.checkpoint.files import Checkpoint
from fastagg.checkpoint.keys import KeyIndex, is_head, tied_embedding
from fastagg.errors import InvalidInput
from fastagg.peft_format.layout import TensorSpan
from fastagg.peft_format.safetensors_file import view

Tied = Literal["keep", "untie"]


@dataclass(frozen=True)
class Change:
    """What is to be merged into a base model.

    Attributes:
        name: what errors call it.
        deltas: the delta weights, at most one a module.
        whole: parameter name -> the tensor that replaces it (modules_to_save).
        base: parameter name -> the base weight that the adapter was trained beside, as PEFT saves
            it with targeted embeddings; it replaces the parameter before its delta is added.
    """

    name: str | None
    deltas: Sequence[Delta]
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of_adapter(cls, adapter: Adapter) -> Change:
        """What an adapter changes; its tensors are read when they are merged.

        Raises:
            InvalidInput: its initialisation changed the base weights.
        """
        if adapter.config.changes_base is not None:
            raise InvalidInput(
                "the initialisation moved a part of the base weights into the adapter, which the "
                "checkpoint still has",
                client=adapter.name,
                field="init_lora_weights",
                got=adapter.config.changes_base,
                cure="Convert the adapter to plain LoRA first: "
                "save_pretrained(path_initial_model_for_weight_conversion=...)",
            )

        def named(inside: bool) -> dict[str, torch.Tensor]:
            return {
                span.parameter: view(adapter.flat, span)
                for span in adapter.layout.whole
                if (".base_layer." in span.key) == inside
            }

        return cls(adapter.name, of_adapter(adapter), whole=named(False), base=named(True))


@dataclass
class Entry:
    """One tensor of the new checkpoint.

    Attributes:
        span: where its bytes lie in the base, None where `replacement` gives them.
        shard: the file that it goes into.
        replacement: a tensor to write in place of the base's, cast to `dtype`.
        deltas: what is added afterwards.
    """

    key: str
    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    span: TensorSpan | None
    source_shard: str = ""
    replacement: torch.Tensor | None = None
    deltas: list[Delta] = field(default_factory=list)


class Targets:
    """The entries of a merged checkpoint.

    Attributes:
        entries: tensor name -> entry.
        added: names that the base does not have.
        replaced: names whose tensor is replaced by the adapter's.
        untied: the output head gets a weight of its own.
        notes: what a user should know about the result.
    """

    def __init__(self, base: Checkpoint, change: Change, tied: Tied) -> None:
        self.base = base
        self.change = change
        self.keys = KeyIndex(base.where)
        self.added: list[str] = []
        self.replaced: list[str] = []
        self.notes: list[str] = []
        self.entries = {key: self._entry(key, key) for key in base.where}
        self._embedding = tied_embedding(self.keys, base.config)
        self._head = self._head_name()
        self.untied = self._unties(tied)
        if self.untied:
            self._add_head()
        self._place_tensors()
        self._place_deltas()

    def by_shard(self) -> dict[str, list[Entry]]:
        """File name -> its entries, wide dtypes first, so that each is aligned."""
        files: dict[str, list[Entry]] = {name: [] for name in self.base.shards}
        for entry in self.entries.values():
            files[entry.shard].append(entry)
        for entries in files.values():
            entries.sort(key=lambda entry: -entry.dtype.itemsize)
        return files

    def _entry(self, key: str, source: str) -> Entry:
        span, shard = self.base.span(source), self.base.where[source]
        return Entry(key, shard, span.dtype, span.shape, span, source_shard=shard)

    def _head_name(self) -> str:
        """The weight that a head gets which shared the embedding's."""
        named = (f"{delta.module}.weight" for delta in self.change.deltas if is_head(delta.module))
        saved = (name for name in self.change.whole if is_head(name.rpartition(".")[0]))
        return next(chain(named, saved), "lm_head.weight")

    def _unties(self, tied: Tied) -> bool:
        """Whether the head that shares the embedding's weight gets one of its own."""
        if self._embedding is None:
            return False
        whole = {self._resolve(name): value for name, value in self.change.whole.items()}
        head, embedding = whole.get(self._head), whole.get(self._embedding)
        if head is not None or embedding is not None:
            both = head is not None and embedding is not None
            return not (both and torch.equal(head, embedding))  # type: ignore[arg-type]
        touched = [delta.module for delta in self.change.deltas if self._shared(delta)]
        if not touched:
            return False
        if tied == "keep":
            self.notes.append(
                f"{', '.join(touched)}: the input embedding and the output head share this weight "
                "and both change, as in PEFT's merge_and_unload, while the adapter changed one; "
                "--tied untie gives each a weight of its own"
            )
        return tied == "untie"

    def _shared(self, delta: Delta) -> bool:
        return self._resolve(f"{delta.module}.weight") in (self._head, self._embedding)

    def _resolve(self, parameter: str) -> str:
        """The name of a parameter in the checkpoint; `_head` for a head that shares the embedding's
        weight; the parameter's own where there is no such tensor."""
        module, _, leaf = parameter.rpartition(".")
        found = self.keys.find(parameter, client=self.change.name, module=module)
        if found is not None:
            return found
        if self._embedding is not None and is_head(module) and leaf == "weight":
            return self._head
        return parameter

    def _target(self, parameter: str) -> str:
        """As `_resolve`, a shared head being the embedding's weight."""
        name = self._resolve(parameter)
        if name == self._head and self._embedding is not None and not self.untied:
            return self._embedding
        return name

    def _add_head(self) -> None:
        assert self._embedding is not None
        self.entries[self._head] = self._entry(self._head, self._embedding)
        self.added.append(self._head)
        self.notes.append(
            f"the output head shared {self._embedding} and has its own weight now: {self._head}"
        )

    def _place_tensors(self) -> None:
        for parameter, tensor in self.change.base.items():
            entry = self.entries.get(self._target(parameter))
            if entry is None:
                module = parameter.rpartition(".")[0]
                raise self.keys.missing(parameter, client=self.change.name, module=module)
            self._replace(entry, tensor, parameter)
        for parameter, tensor in self.change.whole.items():
            name = self._target(parameter)
            entry = self.entries.get(name)
            if entry is None:
                self._add(name, tensor)
                continue
            self._replace(entry, tensor, parameter)
            if name not in self.added:
                self.replaced.append(name)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        shard = list(self.base.shards)[-1]
        self.entries[name] = Entry(
            name, shard, tensor.dtype, tuple(tensor.shape), None, replacement=tensor
        )
        self.added.append(name)
        self.notes.append(f"{name} was not in the base checkpoint and is added to it")

    def _replace(self, entry: Entry, tensor: torch.Tensor, parameter: str) -> None:
        module = parameter.rpartition(".")[0]
        if tuple(tensor.shape) != entry.shape:
            raise InvalidInput(
                "the adapter's own tensor does not have the shape of the base checkpoint's",
                client=self.change.name,
                module=module,
                field=entry.key,
                expected=" x ".join(map(str, entry.shape)),
                got=" x ".join(map(str, tensor.shape)),
                cure="Resize the base model first (resize_token_embeddings) and save it",
            )
        check_mergeable(module, entry.dtype, client=self.change.name)
        entry.replacement = tensor

    def _place_deltas(self) -> None:
        placed: list[tuple[Delta, Entry]] = []
        owner: dict[str, str] = {}
        for delta in self.change.deltas:
            name = self._target(f"{delta.module}.weight")
            entry = self.entries.get(name)
            if entry is None:
                raise self.keys.missing(
                    f"{delta.module}.weight", client=self.change.name, module=delta.module
                )
            if name in owner and name != self._embedding:
                raise InvalidInput(
                    f"the module means the same tensor as {owner[name]}",
                    client=self.change.name,
                    module=delta.module,
                    field=name,
                    cure="Give the base model that the adapter was trained on",
                )
            owner[name] = delta.module
            check_mergeable(delta.module, entry.dtype, client=self.change.name)
            placed.append((delta, entry))
        shapes = [entry.shape for _, entry in placed]
        deltas = oriented([delta for delta, _ in placed], shapes, client=self.change.name)
        for delta, (_, entry) in zip(deltas, placed, strict=True):
            entry.deltas.append(delta)
