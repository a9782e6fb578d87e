"""Adding an aggregate into the base model's weights, in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from fastagg.accumulators import Source, WholeAverages
from fastagg.checkpoint import Change
from fastagg.checkpoint.deltas import Delta, check_mergeable, oriented
from fastagg.checkpoint.keys import KeyIndex
from fastagg.errors import InvalidInput
from fastagg.handouts.writer import HandoutWriter
from fastagg.peft_format.layout import Slot, TensorSpan

__all__ = ["add_to_base", "as_change"]

# What PEFT and training frameworks put into the names of a live model's parameters.
_PREFIX = re.compile(r"^(?:.*\.)?base_model\.model\.")
_WRAPPERS = re.compile(
    r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)"
    r"|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)

Base = torch.nn.Module | Mapping[str, torch.Tensor]


def add_to_base(
    base: Base, writer: HandoutWriter, slots: Sequence[Slot], whole: Sequence[TensorSpan]
) -> None:
    """W += dW for every module, and whole tensors replaced; all is checked before any change.

    Raises:
        InvalidInput: a module that the base lacks, or a weight of another shape or no float.
    """
    weights = _Weights(base)
    targets = {slot.module: weights.find(f"{slot.module}.weight", slot.module) for slot in slots}
    deltas = oriented(
        [_delta(slot) for slot in slots],
        [tuple(targets[slot.module][0].shape) for slot in slots],
        client=None,
    )
    transposed = {delta.module: delta.transposed for delta in deltas}
    for slot in slots:
        for weight in targets[slot.module]:
            check_mergeable(slot.module, weight.dtype, client=None)
            _check_there(weight, slot.module)
    # What PEFT saves beside a targeted embedding is its base weight, which comes before its delta.
    replaced = {span.key: weights.find_like(span) for span in whole}
    with torch.no_grad():
        _replace(writer.source, replaced)
        for bucket, lo, hi in writer.parts():
            chunk = writer.source.load(bucket, lo, hi)
            for place, module in enumerate(chunk.modules):
                for weight in targets[module]:
                    rows = (chunk.n, chunk.m) if transposed[module] else (chunk.m, chunk.n)
                    matrix = weight.contiguous().view(rows)
                    chunk.add_to(place, matrix, transposed=transposed[module])
                    if not weight.is_contiguous():
                        weight.copy_(matrix.view(weight.shape))


class _Weights:
    """The tensors of a base model by the names that a plain model would give them."""

    def __init__(self, base: Base) -> None:
        self._by_name: dict[str, list[torch.Tensor]] = {}
        for name, tensor in _named(base):
            if "lora_" in name:
                continue
            plain = _WRAPPERS.sub("", _PREFIX.sub("", name))
            same = self._by_name.setdefault(plain, [])
            if all(other is not tensor for other in same):
                same.append(tensor)
        self._keys = KeyIndex(self._by_name)

    def find(self, parameter: str, module: str) -> list[torch.Tensor]:
        """The tensors of a parameter: more than one where PEFT keeps a trained copy beside it."""
        name = self._keys.find(parameter, client=None, module=module)
        if name is None:
            raise self._keys.missing(parameter, client=None, module=module)
        return self._by_name[name]

    def find_like(self, span: TensorSpan) -> list[torch.Tensor]:
        """The tensors that a whole tensor replaces."""
        found = self.find(span.parameter, span.parameter.rpartition(".")[0])
        for tensor in found:
            if tuple(tensor.shape) != span.shape:
                raise InvalidInput(
                    "the averaged tensor does not have the shape of the base model's",
                    module=span.parameter.rpartition(".")[0],
                    field=span.key,
                    expected="x".join(map(str, tensor.shape)),
                    got="x".join(map(str, span.shape)),
                    cure="Give the base model that the adapters were trained on, resized as they "
                    "had it",
                )
            check_mergeable(span.parameter, tensor.dtype, client=None)
            _check_there(tensor, span.parameter)
        return found


def _named(base: Base) -> list[tuple[str, torch.Tensor]]:
    if isinstance(base, torch.nn.Module):
        return [
            *base.named_parameters(remove_duplicate=False),
            *base.named_buffers(remove_duplicate=False),
        ]
    if isinstance(base, Mapping):
        return [(name, value) for name, value in base.items() if isinstance(value, torch.Tensor)]
    raise InvalidInput(
        "not a base model",
        field="base",
        expected="a torch.nn.Module, or a dict of weights by parameter name",
        got=type(base).__name__,
    )


def _delta(slot: Slot) -> Delta:
    def never(matrix: torch.Tensor, transposed: bool) -> None:
        raise AssertionError("only its orientation is asked for")

    return Delta(
        slot.module, slot.kind, slot.m, slot.n, slot.weight_shape, slot.transposed, never
    )


def _check_there(weight: torch.Tensor, module: str) -> None:
    if weight.is_meta:
        raise InvalidInput(
            "the base weight has no data",
            module=module,
            expected="a loaded weight",
            got="a tensor on the meta device",
            cure="Load the model's weights first",
        )


def _replace(source: Source, replaced: Mapping[str, Sequence[torch.Tensor]]) -> None:
    for key, tensors in replaced.items():
        for begin, end, values in source.whole.blocks(key):
            for tensor in tensors:
                # reshape may copy where the tensor is not contiguous: index its elements instead.
                if tensor.is_contiguous():
                    tensor.view(-1)[begin:end].copy_(values)
                else:
                    index = torch.arange(begin, end, device=tensor.device)
                    where = torch.unravel_index(index, tensor.shape)
                    tensor[where] = values.to(tensor.device, tensor.dtype)


def as_change(
    name: str,
    add_delta: Callable[..., None],
    slots: Sequence[Slot],
    averages: WholeAverages,
    whole: Sequence[TensorSpan],
) -> Change:
    """An aggregate as a checkpoint merge takes it.

    Args:
        add_delta: (module, matrix, transposed=...) adds dW into a matrix in place.
        averages, whole: of the whole tensors, and what they are.
    """

    def adder(module: str) -> Callable[[torch.Tensor, bool], None]:
        return lambda matrix, transposed: add_delta(module, matrix, transposed=transposed)

    def tensors(inside: bool) -> dict[str, torch.Tensor]:
        return {
            span.parameter: _average(averages, span)
            for span in whole
            if (".base_layer." in span.key) == inside
        }

    deltas = [replace(_delta(slot), add=adder(slot.module)) for slot in slots]
    return Change(name, deltas, whole=tensors(False), base=tensors(True))


def _average(averages: WholeAverages, span: TensorSpan) -> torch.Tensor:
    flat = torch.empty(span.count, dtype=span.dtype)
    for begin, end, values in averages.blocks(span.key):
        flat[begin:end].copy_(values)
    return flat.view(span.shape)
