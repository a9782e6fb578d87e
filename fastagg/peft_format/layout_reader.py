"""Reads the keys and shapes of a PEFT adapter into a layout, refusing what is not plain LoRA."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastagg.dtypes import DTYPE_CODES, dtype_name
from fastagg.errors import InvalidInput
from fastagg.peft_format.config import AdapterConfig
from fastagg.peft_format.layout import PREFIX, Kind, Layout, Slot, TensorSpan

__all__ = ["read_layout", "read_ranks"]

_BASE = re.compile(r"(?:^|\.)base_model\.model\.")
# Wrappers of training frameworks put themselves into the names of a live model's modules.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<linear>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.(?P<embedding_adapter>[^.]+))?)"
)
_LORA = re.compile(r"(?:^|\.)lora_")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")

# Tensors that say by their name which variant they belong to; the configuration usually says so
# first, but a state dict may come with a configuration that does not match.
_VARIANT_TENSORS = {
    "lora_magnitude_vector": "the magnitude of DoRA, whose update is not B A",
    "lora_diag": "the diagonal of KaSA, whose update is not B A",
    "lora_velora": "the projection of VeLoRA, which is neither A nor B",
    "lora_arrow": "the router of Arrow, whose update is not B A",
    "lora_monteclora": "a sampler of MonteCLoRA, whose update is not B A",
    "lora_B.bias": "the bias of lora_bias=True, which is not part of B A",
    "trainable_tokens": "single trained token rows (trainable_token_indices)",
}
_KINDS: dict[int, Kind] = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
_RESAVE = "Pass what peft.get_peft_model_state_dict returns, or a folder written by save_pretrained"


@dataclass
class _Factors:
    embedding: bool
    a: TensorSpan | None = None
    b: TensorSpan | None = None


def read_layout(
    spans: Sequence[TensorSpan],
    config: AdapterConfig,
    nbytes: int,
    digest: str,
    client: str | None,
) -> Layout:
    """Builds the layout; :meth:`Layout.of` documents arguments and errors."""
    reader = _Reader(config, client)
    for span in spans:
        reader.sort(span)
    if not reader.factors:
        raise reader.error(
            "the adapter has no LoRA module",
            expected="keys like base_model.model.<module>.lora_A.weight",
            got=_some(span.source for span in spans),
            cure="Check that this is the adapter's file, not the model's",
        )
    slots = [reader.slot(module, pair) for module, pair in reader.factors.items()]
    reader.refuse_whole_models(slots)
    reader.refuse_tied(slots)
    return Layout(slots, reader.whole.values(), nbytes, digest)


def read_ranks(shapes: Iterable[tuple[str, Sequence[int]]]) -> dict[str, int]:
    """Module -> rank, as the shapes of the A factors have it, whatever the configuration says.

    Args:
        shapes: (key, shape) of each tensor, under the client's own keys; others than A are passed over.
    """
    placed = ((_module_of_a(key), shape) for key, shape in shapes)
    return {module: int(shape[0]) for module, shape in placed if module is not None and len(shape)}


@functools.lru_cache(maxsize=1 << 16)
def _module_of_a(key: str) -> str | None:
    """The module whose A factor a key is. Cached: the clients of a federation have the same keys."""
    match = _FACTOR.fullmatch(_canonical(key))
    if match is None or not (match["embedding"] or match["linear"]).endswith("A"):
        return None
    return match["module"]


class _Reader:
    def __init__(self, config: AdapterConfig, client: str | None) -> None:
        self.config = config
        self.client = client
        self.factors: dict[str, _Factors] = {}
        self.whole: dict[str, TensorSpan] = {}
        self.adapter: str | None = None

    def error(
        self,
        problem: str,
        *,
        module: str | None = None,
        field: str | None = None,
        expected: object = None,
        got: object = None,
        cure: str | None = None,
    ) -> InvalidInput:
        return InvalidInput(
            problem,
            client=self.client,
            module=module,
            field=field,
            expected=expected,
            got=got,
            cure=cure,
        )

    def sort(self, span: TensorSpan) -> None:
        """Files one tensor under its module or among the whole ones."""
        name = _canonical(span.source)
        if span.dtype not in DTYPE_CODES:
            raise self.error(
                "a dtype that cannot be aggregated",
                field=span.source,
                expected="float32, bfloat16 or float16",
                got=dtype_name(span.dtype),
                cure="Cast it to float32 and save the adapter again",
            )
        match = _FACTOR.fullmatch(name)
        if match is not None:
            self._factor(span, match)
        else:
            self._whole(span, name)

    def _factor(self, span: TensorSpan, match: re.Match[str]) -> None:
        module = match["module"]
        self._one_adapter(match["adapter"] or match["embedding_adapter"], span)
        embedding = match["embedding"] is not None
        which = match["embedding"] or match["linear"]
        key = f"{PREFIX}{module}.{which}" + ("" if embedding else ".weight")
        pair = self.factors.setdefault(module, _Factors(embedding))
        if pair.embedding != embedding:
            raise self.error("both linear and embedding factors", module=module, field=span.source)
        side = "a" if which.endswith("A") else "b"
        other = getattr(pair, side)
        if other is not None:
            raise self.error(
                "two tensors for one factor",
                module=module,
                field=span.source,
                got=f"also {other.source}",
                cure="Keep one adapter per folder or state dict",
            )
        setattr(pair, side, replace(span, key=key))

    def _one_adapter(self, name: str | None, span: TensorSpan) -> None:
        if name is None:
            return
        if self.adapter not in (None, name):
            raise self.error(
                "two adapters in one state dict",
                field=span.source,
                expected=repr(self.adapter),
                got=repr(name),
                cure="Pass one: peft.get_peft_model_state_dict(model, adapter_name=...)",
            )
        self.adapter = name

    def _whole(self, span: TensorSpan, name: str) -> None:
        for part, what in _VARIANT_TENSORS.items():
            if part in name:
                raise self.error(
                    f"a tensor that is {what}",
                    field=span.source,
                    cure="Train these clients with plain LoRA",
                )
        if _LORA.search(name):
            raise self.error(
                "a LoRA tensor of an unknown kind",
                field=span.source,
                expected="lora_A.weight, lora_B.weight, lora_embedding_A or lora_embedding_B",
                cure="Train these clients with plain LoRA, or upgrade FastAgg",
            )
        if ".original_module." in name:
            raise self._whole_model(span.source)
        key = PREFIX + _SAVED.sub(".", name)
        if key in self.whole:
            raise self.error(
                "two tensors for one parameter",
                field=span.source,
                got=f"also {self.whole[key].source}",
                cure="Keep one adapter per folder or state dict",
            )
        self.whole[key] = replace(span, key=key)

    def _whole_model(self, source: str) -> InvalidInput:
        return self.error(
            "the state dict holds the base model's weights too",
            field=source,
            expected="the adapter's tensors only",
            cure=_RESAVE,
        )

    def refuse_whole_models(self, slots: Iterable[Slot]) -> None:
        # PEFT saves the base weights of targeted embeddings, and of the output layer among them:
        # one linear module at most.
        linear = [
            f"{PREFIX}{slot.module}.base_layer.weight" for slot in slots if slot.kind != "embedding"
        ]
        held = [key for key in linear if key in self.whole]
        if len(held) > 1:
            raise self._whole_model(self.whole[held[0]].source)

    def refuse_tied(self, slots: Iterable[Slot]) -> None:
        embeddings = [slot.module for slot in slots if slot.kind == "embedding"]
        if self.config.ties_weights and embeddings:
            raise self.error(
                "tied adapters share their factors, which new factors would tear apart",
                module=embeddings[0],
                field="ensure_weight_tying",
                expected="unset",
                got=True,
                cure="Train these clients without tied adapters",
            )

    def slot(self, module: str, pair: _Factors) -> Slot:
        """The slot of one module, its shapes and its rank checked."""
        a, b = pair.a, pair.b
        if a is None or b is None:
            raise self.error(
                f"lora_{'A' if a is None else 'B'} is missing",
                module=module,
                got="only " + ", ".join(span.source for span in (a, b) if span),
                cure="The file was cut or filtered: save the adapter again",
            )
        self._check_shapes(module, pair.embedding, a, b)
        rank = a.shape[0]
        self._check_rank(module, rank)
        scaling = self.config.scaling_of(module)
        m, n = b.shape[0], math.prod(a.shape[1:])
        if pair.embedding:
            return Slot(module, "embedding", m, n, rank, scaling, a, b, (n, m), True)
        if len(a.shape) > 2:
            kind, shape = _KINDS[len(a.shape)], (m, *a.shape[1:])
            return Slot(module, kind, m, n, rank, scaling, a, b, shape, False)
        flipped = self.config.fan_in_fan_out
        shape = (n, m) if flipped else (m, n)
        return Slot(module, "linear", m, n, rank, scaling, a, b, shape, flipped)

    def _check_shapes(self, module: str, embedding: bool, a: TensorSpan, b: TensorSpan) -> None:
        dims = len(a.shape)
        if dims != len(b.shape) or dims not in ((2,) if embedding else _KINDS):
            raise self.error(
                "the factors are not matrices",
                module=module,
                field=f"{a.source}, {b.source}",
                expected="lora_A (rank, n) and lora_B (m, rank)",
                got=f"{a.shape} and {b.shape}",
                cure="Under ZeRO-3 or FSDP, gather the shards before saving",
            )
        if 0 in a.shape or 0 in b.shape:
            raise self.error(
                "a factor is empty",
                module=module,
                field=(a if 0 in a.shape else b).source,
                expected="a rank and sizes of at least 1",
                got=f"{a.shape} and {b.shape}",
                cure="Leave untrained modules out; under ZeRO-3 or FSDP, gather before saving",
            )
        if set(b.shape[2:]) - {1}:
            raise self.error(
                "lora_B of a convolution has a kernel",
                module=module,
                field=b.source,
                expected=(b.shape[0], a.shape[0], *[1] * (dims - 2)),
                got=b.shape,
                cure="Save the adapter again with PEFT",
            )
        if a.shape[0] != b.shape[1]:
            grouped = dims > 2 and a.shape[0] % b.shape[1] == 0
            raise self.error(
                "lora_A and lora_B have different ranks",
                module=module,
                field=f"{a.source}, {b.source}",
                expected=f"lora_B {(b.shape[0], a.shape[0], *b.shape[2:])}",
                got=b.shape,
                cure="Grouped convolutions are not supported: leave it out of target_modules"
                if grouped
                else "The file was damaged or mixed from two adapters: save it again",
            )

    def _check_rank(self, module: str, rank: int) -> None:
        stated = self.config.rank_of(module)
        if stated != rank:
            raise self.error(
                "the rank of the tensors contradicts the configuration",
                module=module,
                field="r" if stated == self.config.rank else "rank_pattern",
                expected=f"rank {stated}",
                got=f"rank {rank}",
                cure="Save the configuration that the adapter was trained with: its scaling "
                "depends on the rank",
            )


def _canonical(source: str) -> str:
    """The key from the module's name on: without base_model.model, whatever stands before it."""
    match = _BASE.search(source)
    name = source[match.end() :] if match else source
    return _WRAPPERS.sub("", name)


def _some(sources: Iterable[str]) -> str:
    names = sorted(sources)
    return ", ".join(names[:3]) + (", .." if len(names) > 3 else "") or "no tensor"
