"""A LoRA adapter as PEFT has it: a configuration and tensors, in one flat buffer."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastagg.errors import InvalidInput
from fastagg.peft_format.adapter_folder import (
    WEIGHTS_NAME,
    find_weights,
    named_path,
    new_folder,
    read_config,
    write_synced,
)
from fastagg.peft_format.config import CONFIG_NAME, AdapterConfig
from fastagg.peft_format.layout import Layout, Slot, TensorSpan, hash_of, packed
from fastagg.peft_format.safetensors_file import MappedFile, header_bytes, view

__all__ = ["WEIGHTS_NAME", "Adapter"]


# The largest float32.
_LARGEST = torch.finfo(torch.float32).max


class Adapter:
    """One client's adapter: immutable, its tensors addressed by offset in one flat buffer.

    Args:
        state_dict: key -> tensor, with PEFT's keys; a prefix before ``base_model`` and an adapter's
            name (``lora_A.default.weight``) are understood. Copied once.
        config: the fields of ``adapter_config.json``, an AdapterConfig or a ``peft.LoraConfig``.
        name: what errors and reports call it.
        dtype: cast all tensors to it as they are copied; None keeps each tensor's own.

    Raises:
        InvalidInput: anything that cannot be aggregated exactly, named with its cure.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | AdapterConfig | Any,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        parsed = AdapterConfig.of(config, client=name)
        spans, nbytes = _planned(state_dict, dtype, name)
        layout = Layout.of(spans, parsed, nbytes, client=name)
        flat = torch.empty(nbytes, dtype=torch.uint8)
        _fill(flat, spans, state_dict)
        self._set(flat, layout, parsed, name, None)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Maps a folder that PEFT wrote; its tensors are read when they are used.

        A foreign file whose tensors are not aligned to their elements is copied once instead, so
        that ``flat`` is aligned always.

        Raises:
            InvalidInput: no such folder, no configuration, a pickle, a damaged file, or an adapter
                that cannot be aggregated exactly.
        """
        path = Path(folder)
        name = named_path(path).name
        config = AdapterConfig.from_dict(read_config(path, name), client=name)
        file = MappedFile.open(find_weights(path, name), client=name)
        spans = list(file.spans.values())
        digest = hash_of(file.header, config.canonical)
        layout = Layout.of(spans, config, file.flat.numel(), digest=digest, client=name)
        if not file.aligned:
            return cls({span.source: view(file.flat, span) for span in spans}, config, name=name)
        return cls.from_flat(file.flat, layout, config, name=name, file=file)

    @classmethod
    def from_flat(
        cls,
        flat: torch.Tensor,
        layout: Layout,
        config: AdapterConfig,
        *,
        name: str | None = None,
        file: MappedFile | None = None,
    ) -> Adapter:
        """Wraps a flat buffer (1-D uint8, on the CPU) that a layout describes, without a copy."""
        adapter = cls.__new__(cls)
        adapter._set(flat, layout, config, name, file)
        return adapter

    def _set(
        self,
        flat: torch.Tensor,
        layout: Layout,
        config: AdapterConfig,
        name: str | None,
        file: MappedFile | None,
    ) -> None:
        self._flat = flat
        self._layout = layout
        self._config = config
        self._name = name
        self._file = file

    @property
    def flat(self) -> torch.Tensor:
        """All bytes: 1-D uint8 on the CPU. Not to be written to."""
        return self._flat

    @property
    def layout(self) -> Layout:
        """What lies where in ``flat``."""
        return self._layout

    @property
    def config(self) -> AdapterConfig:
        """The parsed configuration."""
        return self._config

    @property
    def name(self) -> str | None:
        """The folder's name, or the one given."""
        return self._name

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the LoRA modules, sorted."""
        return tuple(self._layout.by_module)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(span.nbytes for span in self._layout.tensors)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors, or the one that holds them all."""
        kinds = [span.dtype for slot in self._layout.slots for span in (slot.a, slot.b)]
        return functools.reduce(torch.promote_types, kinds)

    def rank(self, module: str) -> int:
        """The rank of one module."""
        return self._slot(module).rank

    def scaling(self, module: str) -> float:
        """PEFT's scaling of one module."""
        return self._slot(module).scaling

    def _slot(self, module: str) -> Slot:
        try:
            return self._layout.by_module[module]
        except KeyError:
            raise InvalidInput(
                "the adapter has no such module",
                client=self._name,
                module=module,
                expected=f"one of {len(self.modules)}, such as {self.modules[0]}",
            ) from None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors under their original keys: views into ``flat``, not to be written to."""
        return {span.source: view(self._flat, span) for span in self._layout.tensors}

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, n) and B (m, rank) of one module, views into ``flat``."""
        slot = self._slot(module)
        a = view(self._flat, slot.a).view(slot.rank, slot.n)
        return a, view(self._flat, slot.b).view(slot.m, slot.rank)

    def delta(self, module: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """scaling * B A in float32, or another dtype, and the shape of the module's own weight."""
        slot = self._slot(module)
        a, b = self.factors(module)
        product = torch.mm(b.to(dtype), a.to(dtype)).mul_(slot.scaling)
        return (product.t() if slot.transposed else product).reshape(slot.weight_shape)

    def check_unchanged(self, client: str | None = None) -> None:
        """Raises InvalidInput where the file was rewritten in place since it was mapped."""
        if self._file is not None:
            self._file.check_unchanged(client or self._name)

    def check_finite(self, client: str | None = None) -> None:
        """Reads every number once.

        Raises:
            InvalidInput: NaN or infinity, naming the first tensor that has any and their count; factors
                whose product may leave float32's range; or the file was rewritten since it was mapped.
        """
        from fastagg import ops

        client = client or self._name
        self.check_unchanged(client)
        nonfinite, squares = ops.scan(self._flat, self._layout.spans_table)
        bad = torch.nonzero(nonfinite).flatten()
        if bad.numel():
            first = int(bad[0])
            span = self._layout.tensors[first]
            modules = [slot.module for slot in self._layout.slots if span in (slot.a, slot.b)]
            raise InvalidInput(
                f"{int(nonfinite[first])} of {span.count} values are NaN or infinite"
                + (f", and {bad.numel() - 1} more tensors have such" if bad.numel() > 1 else ""),
                client=client,
                module=modules[0] if modules else None,
                field=span.source,
                expected="finite values",
                cure="The client's training diverged: leave it out of this round (--skip-invalid)",
            )
        norms = dict(zip(self._layout.tensors, squares.sqrt().tolist(), strict=True))
        for slot in self._layout.slots:
            # |s B A|_F <= |s| |B|_F |A|_F: one such client would spoil the sum for all.
            bound = abs(slot.scaling) * norms[slot.a] * norms[slot.b]
            if bound > _LARGEST:
                raise InvalidInput(
                    "the factors are so large that their product may leave the range of float32",
                    client=client,
                    module=slot.module,
                    expected=f"|scaling| |B| |A| of at most {_LARGEST:.2g}",
                    got=f"{bound:.2g}",
                    cure="The client's training diverged: leave it out of this round (--skip-invalid)",
                )

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes a folder that PEFT loads: written beside, synced, then renamed into place.

        The tensors get PEFT's own keys, whatever stood before ``base_model`` in the client's.

        Raises:
            InvalidInput: the folder exists and may not be overwritten.
        """
        with new_folder(Path(folder), overwrite=overwrite, client=self._name) as made:
            write_synced(made / CONFIG_NAME, [self._config.file_text.encode()])
            write_synced(made / WEIGHTS_NAME, self._file_chunks())

    def _file_chunks(self) -> Iterator[bytes | memoryview]:
        own = {span.key: span for span in self._layout.tensors}
        order, _ = packed(own.values())
        entries = {key: (span.dtype, span.shape) for key, span in order.items()}
        yield header_bytes(entries, {"format": "pt"})
        data = self._flat.numpy().data
        for key in order:
            yield data[own[key].offset : own[key].offset + own[key].nbytes]

    def __repr__(self) -> str:
        ranks = sorted({slot.rank for slot in self._layout.slots})
        named = f"{self._name!r}, " if self._name else ""
        return f"Adapter({named}{len(self.modules)} modules, rank {', '.join(map(str, ranks))})"


def _planned(
    state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype | None, client: str | None
) -> tuple[tuple[TensorSpan, ...], int]:
    """Where each tensor will lie in one buffer, packed as safetensors would."""
    if not isinstance(state_dict, Mapping):
        raise InvalidInput(
            "not a state dict",
            client=client,
            field="state_dict",
            expected="a mapping from keys to tensors",
            got=type(state_dict).__name__,
        )
    for key, tensor in state_dict.items():
        named = isinstance(key, str) and isinstance(tensor, torch.Tensor)
        if not named or tensor.is_meta or tensor.layout != torch.strided:
            raise InvalidInput(
                "not a named tensor with data",
                client=client,
                field=str(key),
                expected="a text and a dense torch.Tensor",
                got=f"{tensor.layout} on {tensor.device}"
                if named
                else f"{type(key).__name__} and {type(tensor).__name__}",
            )
    return _placed(
        tuple((key, tuple(t.shape), dtype or t.dtype) for key, t in state_dict.items())
    )


@functools.lru_cache(maxsize=256)
def _placed(
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...],
) -> tuple[tuple[TensorSpan, ...], int]:
    """Cached, since a round's clients have few distinct shapes, and each tensor costs microseconds."""
    placed, nbytes = packed(TensorSpan(key, 0, shape, dtype, key) for key, shape, dtype in tensors)
    return tuple(placed.values()), nbytes


def _fill(
    flat: torch.Tensor, spans: Iterable[TensorSpan], state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Copies the tensors into their places, those of one dtype in one call: they lie side by side."""
    for dtype, neighbours in itertools.groupby(spans, key=lambda span: span.dtype):
        run = list(neighbours)
        tensors = [state_dict[span.source].detach() for span in run]
        if all(tensor.is_cpu for tensor in tensors):
            room = flat[run[0].offset : run[-1].offset + run[-1].nbytes].view(dtype)
            torch.cat([tensor.reshape(-1) for tensor in tensors], out=room)
        else:
            for span, tensor in zip(run, tensors, strict=True):
                view(flat, span).copy_(tensor)
