"""Where the tensors of an adapter lie in its flat buffer, and what each of them is.

A safetensors file is a JSON header and one contiguous block of data. The layout is the table that
turns the block into LoRA factors; clients with the same header and configuration share one.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from fastagg.dtypes import DTYPE_CODES
from fastagg.peft_format.config import AdapterConfig

__all__ = ["Layout", "Slot", "TensorSpan"]

Kind = Literal["linear", "embedding", "conv1d", "conv2d", "conv3d"]

PREFIX = "base_model.model."


@dataclass(frozen=True)
class TensorSpan:
    """One tensor of the flat buffer.

    Attributes:
        key: the name that PEFT gives it in a file, ``base_model.model.<module>.lora_A.weight``.
        offset: in bytes, from the start of the flat buffer.
        shape, dtype: the tensor is row-major contiguous.
        source: the name that it had in the client's own file or state dict.
    """

    key: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str = ""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.count * self.dtype.itemsize

    @property
    def parameter(self) -> str:
        """The parameter of the base model that a whole tensor stands for."""
        return self.key.removeprefix(PREFIX).replace(".base_layer.", ".")


@dataclass(frozen=True)
class Slot:
    """The LoRA factors of one module: its update is ``scaling * B A``, an m x n matrix.

    Attributes:
        module: the module's name in the base model.
        kind: what the module is.
        m, n: B is (m, rank), A is (rank, n), both row-major in the flat buffer.
        scaling: PEFT's scaling of this module.
        a, b: where the factors lie, shaped as in the file: those of a Conv2d are (rank, in, kh, kw)
            and (out, rank, 1, 1), so that n = in * kh * kw.
        weight_shape: shape of the module's own weight.
        transposed: the weight is the transpose of B A (embeddings, fan_in_fan_out).
    """

    module: str
    kind: Kind
    m: int
    n: int
    rank: int
    scaling: float
    a: TensorSpan
    b: TensorSpan
    weight_shape: tuple[int, ...]
    transposed: bool

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B, as in the file, at another rank."""
        return (rank, *self.a.shape[1:]), (self.b.shape[0], rank, *self.b.shape[2:])


class Layout:
    """The slots of an adapter and its other tensors; immutable, compared by digest.

    Attributes:
        slots: sorted by module.
        whole: tensors that are no factors (modules_to_save, embeddings, biases): averaged plainly.
        nbytes: length of the flat buffer.
        digest: hash of all that the layout depends on.
        part_of: the layout that this has some tensors of; dtypes that clients have in common are those
            of the whole, so that a part is computed as the whole would be.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        whole: Iterable[TensorSpan],
        nbytes: int,
        digest: str,
        part_of: Layout | None = None,
    ) -> None:
        self.slots: tuple[Slot, ...] = tuple(sorted(slots, key=lambda slot: slot.module))
        self.whole: tuple[TensorSpan, ...] = tuple(sorted(whole, key=lambda span: span.key))
        self.nbytes = nbytes
        self.digest = digest
        self.part_of = part_of

    @classmethod
    def of(
        cls,
        spans: Sequence[TensorSpan],
        config: AdapterConfig,
        nbytes: int,
        *,
        digest: str | None = None,
        client: str | None = None,
    ) -> Layout:
        """Sorts a client's tensors into slots and whole tensors.

        Args:
            spans: the tensors under the client's own keys.
            nbytes: length of the flat buffer.
            digest: hash of the spans and the configuration, computed where absent.

        Raises:
            InvalidInput: a factor without its partner, ranks that contradict the configuration, a
                dtype or a key that cannot be aggregated, or no factor at all.
        """
        from fastagg.peft_format.layout_reader import read_layout

        digest = digest or digest_of(spans, config)
        return _cached(digest, lambda: read_layout(spans, config, nbytes, digest, client))

    @classmethod
    def fresh(
        cls,
        slots: Iterable[Slot],
        ranks: Mapping[str, int],
        scalings: Mapping[str, float],
        *,
        dtype: torch.dtype | None = None,
        whole: Iterable[TensorSpan] = (),
    ) -> Layout:
        """A layout for new factors of the same modules, as PEFT would write its file.

        Args:
            slots: the modules; those that ``ranks`` lacks are left out.
            ranks: module -> rank >= 1.
            scalings: module -> scaling.
            dtype: of factors and whole tensors; None keeps each tensor's own.
            whole: other tensors to find room for.

        The tensors are packed without a gap, wide dtypes first, so each is aligned.
        """
        wanted = [slot for slot in slots if slot.module in ranks]
        shaped = [_resized(slot, ranks[slot.module], dtype) for slot in wanted]
        others = [replace(span, dtype=dtype or span.dtype, source=span.key) for span in whole]
        spans, nbytes = packed([span for slot in shaped for span in (slot.a, slot.b)] + others)
        made = [
            replace(slot, a=spans[slot.a.key], b=spans[slot.b.key], scaling=scalings[slot.module])
            for slot in shaped
        ]
        digest = hash_of(repr((spans, [(slot.module, slot.scaling) for slot in made])))
        return cls(made, [spans[span.key] for span in others], nbytes, digest)

    def part(self, modules: Collection[str], keys: Collection[str]) -> Layout:
        """A layout of some modules' factors and some whole tensors alone, packed without a gap."""
        slots = [slot for slot in self.slots if slot.module in modules]
        whole = [span for span in self.whole if span.key in keys]
        spans, nbytes = packed([*(span for slot in slots for span in (slot.a, slot.b)), *whole])
        placed = [replace(slot, a=spans[slot.a.key], b=spans[slot.b.key]) for slot in slots]
        digest = hash_of(self.digest, *spans)
        return Layout(placed, [spans[span.key] for span in whole], nbytes, digest, self.part_of or self)

    @cached_property
    def tensors(self) -> tuple[TensorSpan, ...]:
        """Every tensor, by offset."""
        factors = [span for slot in self.slots for span in (slot.a, slot.b)]
        return tuple(sorted([*factors, *self.whole], key=lambda span: (span.offset, span.key)))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of all factors, or float32 where they differ."""
        if self.part_of is not None:
            return self.part_of.dtype
        return promoted(span.dtype for slot in self.slots for span in (slot.a, slot.b))

    @cached_property
    def dtypes_by_shape(self) -> Mapping[tuple[int, int], torch.dtype]:
        """(m, n) -> the dtype of the factors of all modules of that shape, float32 where they differ."""
        if self.part_of is not None:
            return self.part_of.dtypes_by_shape
        found: dict[tuple[int, int], set[torch.dtype]] = {}
        for slot in self.slots:
            found.setdefault((slot.m, slot.n), set()).update((slot.a.dtype, slot.b.dtype))
        return {shape: promoted(dtypes) for shape, dtypes in found.items()}

    @cached_property
    def by_module(self) -> Mapping[str, Slot]:
        """The slots by module."""
        return {slot.module: slot for slot in self.slots}

    @cached_property
    def spans_table(self) -> torch.Tensor:
        """(T, 3) int64 of offset, count and dtype code in the order of ``tensors``, for scan."""
        rows = [(span.offset, span.count, DTYPE_CODES[span.dtype]) for span in self.tensors]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)

    @cached_property
    def slot_table(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """(J, 6) int64 of a_offset, a_dtype, b_offset, b_dtype, rank, 0 in the order of slots."""
        rows = [
            (
                slot.a.offset,
                DTYPE_CODES[slot.a.dtype],
                slot.b.offset,
                DTYPE_CODES[slot.b.dtype],
                slot.rank,
                0,
            )
            for slot in self.slots
        ]
        return np.array(rows, dtype=np.int64).reshape(-1, 6)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[object, ...]:
        # Between processes go headers: what is made of them is made again.
        return Layout, (self.slots, self.whole, self.nbytes, self.digest, self.part_of)

    def __repr__(self) -> str:
        return f"Layout({len(self.slots)} modules, {len(self.whole)} whole, {self.nbytes} bytes)"


def promoted(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The common dtype where there is one, float32 where they differ."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else torch.float32


def packed(spans: Iterable[TensorSpan]) -> tuple[dict[str, TensorSpan], int]:
    """Places tensors one after the other in the order of safetensors: wide dtypes first, then key.

    Returns:
        The placed spans by key, in order, and the length in bytes.
    """
    ordered = sorted(spans, key=lambda span: (-span.dtype.itemsize, span.key))
    placed, offset = {}, 0
    for span in ordered:
        placed[span.key] = replace(span, offset=offset)
        offset += span.nbytes
    return placed, offset


def _resized(slot: Slot, rank: int, dtype: torch.dtype | None) -> Slot:
    a_shape, b_shape = slot.factor_shapes(rank)
    a = TensorSpan(slot.a.key, 0, a_shape, dtype or slot.a.dtype, slot.a.key)
    b = TensorSpan(slot.b.key, 0, b_shape, dtype or slot.b.dtype, slot.b.key)
    return replace(slot, rank=rank, a=a, b=b)


def digest_of(spans: Iterable[TensorSpan], config: AdapterConfig) -> str:
    """Hash of all that a layout depends on."""
    rows = [(span.source, span.offset, span.shape, str(span.dtype)) for span in spans]
    return hash_of(repr(rows), config.canonical)


def hash_of(*texts: str | bytes) -> str:
    """A digest of texts, each told apart from the next."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


# A round of clients has few distinct layouts; the bound only guards a server that runs for months.
_CACHE_SIZE = 512
_cache: OrderedDict[str, Layout] = OrderedDict()
_cache_lock = threading.Lock()


def _cached(digest: str, build: Callable[[], Layout]) -> Layout:
    with _cache_lock:
        found = _cache.get(digest)
        if found is not None:
            _cache.move_to_end(digest)
            return found
    built = build()
    with _cache_lock:
        kept = _cache.setdefault(digest, built)
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return kept
