"""Which tensor of a checkpoint an adapter's module means.

The names of an adapter and of a checkpoint agree up to a prefix: a base model without its head
drops `model.`, one with another head adds it, and vision-language models moved
`language_model.model.` to `model.language_model.`. A prefix is only ever bridged where exactly one
tensor fits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from fastagg.errors import InvalidInput

# Output heads that transformers ties to the input embedding, and the names of those embeddings.
_HEADS = frozenset({"lm_head", "embed_out", "proj_out", "output"})
_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared"}
)


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names most like `name`, best first."""
    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.0)


class KeyIndex:
    """The tensor names of a checkpoint, found by any suffix of theirs. O(total parts) to build."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = frozenset(keys)
        self._by_suffix: dict[str, list[str]] = {}
        for key in sorted(self.keys):
            for suffix in _suffixes(key):
                self._by_suffix.setdefault(suffix, []).append(key)

    def candidates(self, key: str) -> Sequence[str]:
        """The checkpoint's names that `key` may mean: itself; else those that it is a suffix of, or
        that are a suffix of it; else those equal to it from its first numbered part on."""
        if key in self.keys:
            return [key]
        found = list(self._by_suffix.get(key, []))
        found += [s for s in _suffixes(key) if s in self.keys and _names_one_module(s)]
        if found:
            return sorted(set(found))
        numbered = _numbered_suffix(key)
        if numbered is None:
            return []
        return [
            other for other in self._by_suffix.get(numbered, []) if _numbered_suffix(other) == numbered
        ]

    def find(self, key: str, *, client: str | None, module: str) -> str | None:
        """The one name of the checkpoint that `key` means, None where there is none.

        Raises InvalidInput where several fit.
        """
        candidates = self.candidates(key)
        if len(candidates) > 1:
            raise InvalidInput(
                "several tensors of the base checkpoint fit this module",
                client=client,
                module=module,
                field=key,
                got=", ".join(candidates[:4]),
                cure="train the adapter on the model class whose checkpoint this is, so that the "
                "names agree",
            )
        return candidates[0] if candidates else None

    def missing(self, key: str, *, client: str | None, module: str) -> InvalidInput:
        """The error for a module that the checkpoint does not have."""
        like = nearest(key, self.keys)
        return InvalidInput(
            "the base checkpoint has no tensor for this module",
            client=client,
            module=module,
            expected=key,
            got=f"nearest names: {', '.join(like)}" if like else "a checkpoint without tensors",
            cure="Give the base model that the adapter was trained on",
        )


def is_head(module: str) -> bool:
    """Whether a module is an output head by its name."""
    return module.rpartition(".")[2] in _HEADS


def is_embedding(module: str) -> bool:
    """Whether a module is an input embedding by its name."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def tied_embedding(keys: KeyIndex, config: Mapping[str, object]) -> str | None:
    """The weight of the input embedding that the checkpoint's absent head shares, None where the
    checkpoint has a head of its own, says that nothing is tied, or has no one embedding.

    Sharing is inferred from the absent head: config.json leaves `tie_word_embeddings` out where it
    equals the model class's default.
    """
    weights = [key.removesuffix(".weight") for key in keys.keys if key.endswith(".weight")]
    if any(is_head(module) for module in weights) or not _may_tie(config):
        return None
    embeddings = [module for module in weights if is_embedding(module)]
    return f"{embeddings[0]}.weight" if len(embeddings) == 1 else None


def _may_tie(config: Mapping[str, object]) -> bool:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        generates = ("CausalLM", "LMHead", "ConditionalGeneration")
        if not any(part in str(name) for name in architectures for part in generates):
            return False
    nested = config.get("text_config")
    said = config.get("tie_word_embeddings")
    if said is None and isinstance(nested, Mapping):
        said = nested.get("tie_word_embeddings")
    return said is not False


def _names_one_module(key: str) -> bool:
    """Whether a name without its prefix still says which module it is: a bare `q_proj.weight` at
    the root of a checkpoint is no namesake of a nested one."""
    module = key.rpartition(".")[0]
    return "." in module or is_head(module) or is_embedding(module)


def _suffixes(key: str) -> Iterable[str]:
    """Every proper suffix of a dotted name that starts at a dot."""
    start = key.find(".") + 1
    while start:
        yield key[start:]
        start = key.find(".", start) + 1


def _numbered_suffix(key: str) -> str | None:
    """The name from the part before its first number on: `layers.0.mlp.weight`."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[max(i - 1, 0) :])
    return None
