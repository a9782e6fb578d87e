"""``adapter_config.json``: parsed, or refused with the reason and the way out.

What is linear in B A is handled exactly; a field that makes the update anything else is refused
when it is set, because an aggregate that ignored it would be silently wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastagg.errors import InvalidInput
from fastagg.peft_format.config_reader import CONFIG_NAME, ConfigReader, compiled, is_integer

__all__ = ["CONFIG_NAME", "AdapterConfig"]


# PEFT initialises before it loads, and refuses these at odd ranks and above min(m, n).
_FIT_FEW_RANKS = ("orthogonal", "mica")


@dataclass(frozen=True, eq=False)
class AdapterConfig:
    """One client's LoRA configuration; build it with :meth:`from_dict`.

    Attributes:
        raw: the fields verbatim, as JSON holds them.
        base_model: ``base_model_name_or_path``, None where it is absent or empty.
        rank, alpha: the defaults ``r`` and ``lora_alpha``.
        rank_pattern, alpha_pattern: regular expression -> value, in PEFT's order.
        use_rslora: scaling is alpha / sqrt(r) instead of alpha / r.
        fan_in_fan_out: the base weights of linear modules are stored (in, out).
        ties_weights: factors of tied layers are one tensor in the model.
        changes_base: None, or what fixes the base weights that the client really trained on
            (PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move a part of W into the adapter): adapters
            may be aggregated only with others of the same value.
    """

    raw: Mapping[str, Any]
    base_model: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    ties_weights: bool
    changes_base: str | None

    @classmethod
    def of(cls, config: object, *, client: str | None = None) -> AdapterConfig:
        """A configuration as users have it: its fields, a ``peft.LoraConfig``, or one of these.

        Raises:
            InvalidInput: as :meth:`from_dict`.
        """
        if isinstance(config, AdapterConfig):
            return config
        fields: Any = config
        if not isinstance(config, Mapping) and hasattr(config, "to_dict"):
            fields = config.to_dict()
        return cls.from_dict(fields, client=client)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, client: str | None = None) -> AdapterConfig:
        """Parses the content of an ``adapter_config.json``.

        Raises:
            InvalidInput: not a LoRA configuration, a value that PEFT could not use, or a field
                that makes the update anything but scaling * B A.
        """
        reader = ConfigReader(raw, client)
        reader.refuse_other_types()
        reader.refuse_variants()
        return cls(
            raw=reader.raw,
            base_model=reader.text("base_model_name_or_path"),
            rank=reader.rank(reader.raw.get("r", 8), "r"),
            alpha=reader.alpha(reader.raw.get("lora_alpha", 8), "lora_alpha"),
            rank_pattern=reader.pattern("rank_pattern", reader.rank),
            alpha_pattern=reader.pattern("alpha_pattern", reader.alpha),
            use_rslora=reader.flag("use_rslora"),
            fan_in_fan_out=reader.flag("fan_in_fan_out"),
            ties_weights=reader.flag("ensure_weight_tying"),
            changes_base=reader.changes_base(),
        )

    def rank_of(self, module: str) -> int:
        """The rank that PEFT gives a module."""
        return self.rank_pattern.get(self._rank_key.of(module), self.rank)

    def alpha_of(self, module: str) -> float:
        """The ``lora_alpha`` that PEFT gives a module."""
        return self.alpha_pattern.get(self._alpha_key.of(module), self.alpha)

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv 2312.03732), exactly as PEFT has it."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def revision(self) -> str | None:
        """The revision of the base model, None where none is pinned."""
        return self.raw.get("revision") or None

    @cached_property
    def _rank_key(self) -> _PatternKey:
        return _PatternKey(self.rank_pattern)

    @cached_property
    def _alpha_key(self) -> _PatternKey:
        return _PatternKey(self.alpha_pattern)

    @cached_property
    def canonical(self) -> str:
        """The fields as JSON, sorted: equal texts mean equal configurations."""
        return json.dumps(self._ordered)

    @property
    def file_text(self) -> str:
        """The content of an ``adapter_config.json``."""
        return json.dumps(self._ordered, indent=2)

    @property
    def _ordered(self) -> dict[str, Any]:
        # Only the outermost fields are sorted: PEFT takes the first pattern that matches a module.
        return dict(sorted(self.raw.items()))

    def at_ranks(self, ranks: Mapping[str, int]) -> AdapterConfig:
        """The configuration of a client that trained at these ranks with the same ``lora_alpha``: each
        module's scaling is its own alpha / r.

        Args:
            ranks: module -> rank >= 1.

        Raises:
            InvalidInput: a rank below 1, or another rank for an adapter whose initialisation changed the
                base weights.
        """
        if all(self.rank_of(module) == rank for module, rank in ranks.items()):
            return self
        for module, rank in ranks.items():
            self._check_module(module, rank, 1.0)
        default = Counter(ranks.values()).most_common(1)[0][0]
        raw = {**self.raw, "r": default, "rank_pattern": _exceptions(ranks, default)}
        return AdapterConfig.from_dict(_initialised_at_any_rank(raw))

    def with_ranks(
        self,
        ranks: Mapping[str, int],
        scalings: Mapping[str, float],
        *,
        own_modules: Collection[str] | None = None,
    ) -> AdapterConfig:
        """A configuration under which PEFT gives each module of ``ranks`` that rank and scaling.

        Args:
            ranks: module -> rank >= 1; the modules that the new adapter has.
            scalings: module -> scaling, finite and not zero.
            own_modules: the modules that this configuration's own adapter has. Where they equal
                those of ``ranks``, the fields that choose modules stay as they are; otherwise they
                are replaced by the exact names.

        Raises:
            InvalidInput: a rank below 1, an unusable scaling, or other ranks for an adapter whose
                initialisation changed the base weights (PEFT repeats it at loading, by the rank).
        """
        if not ranks:
            raise InvalidInput("no module is left to configure", field="ranks")
        for module, rank in ranks.items():
            self._check_module(module, rank, scalings[module])
        rank_fields = self._rank_fields(ranks, scalings)
        raw = {**self.raw, **rank_fields}
        if rank_fields:
            raw = _initialised_at_any_rank(raw)
        if own_modules is None or set(own_modules) != ranks.keys():
            raw.update(
                target_modules=_exact_targets(sorted(ranks)),
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
            )
        return AdapterConfig.from_dict(raw)

    def _rank_fields(self, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> dict[str, Any]:
        if all(
            self.rank_of(module) == rank and self.scaling_of(module) == scalings[module]
            for module, rank in ranks.items()
        ):
            return {}
        alphas = {module: _alpha_for(scalings[module], rank) for module, rank in ranks.items()}
        default_rank = Counter(ranks.values()).most_common(1)[0][0]
        default_alpha = Counter(alphas.values()).most_common(1)[0][0]
        return {
            "r": default_rank,
            "lora_alpha": default_alpha,
            "rank_pattern": _exceptions(ranks, default_rank),
            "alpha_pattern": _exceptions(alphas, default_alpha),
            "use_rslora": False,
        }

    def _check_module(self, module: str, rank: int, scaling: float) -> None:
        if not is_integer(rank) or rank < 1:
            raise InvalidInput(
                "not a rank", module=module, field="ranks", expected="an integer >= 1", got=rank
            )
        if not math.isfinite(scaling) or scaling == 0:
            raise InvalidInput(
                "no adapter can have this scaling",
                module=module,
                field="scalings",
                expected="a finite number other than 0",
                got=scaling,
            )
        if self.changes_base and rank != self.rank_of(module):
            raise InvalidInput(
                f"the initialisation {self.raw['init_lora_weights']!r} derives the base weights "
                "from the rank, so its adapters keep theirs",
                module=module,
                field="ranks",
                expected=self.rank_of(module),
                got=rank,
                cure="Convert them first: save_pretrained(path_initial_model_for_weight_conversion=...)",
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdapterConfig):
            return NotImplemented
        return self.canonical == other.canonical

    def __hash__(self) -> int:
        return hash(self.canonical)


class _PatternKey:
    """``peft.utils.other.get_pattern_key``: the first pattern that matches a module, else its name.

    Patterns of the form ``^escaped name`` are looked up instead of tried: an adapter with a rank of
    its own in each module has as many patterns as modules.
    """

    def __init__(self, patterns: Mapping[str, object]) -> None:
        self._exact: dict[str, tuple[int, str]] = {}
        self._tried: list[tuple[int, re.Pattern[str], str]] = []
        for index, key in enumerate(patterns):
            name = key[1:].replace("\\", "")
            if key == "^" + re.escape(name):
                self._exact.setdefault(name, (index, key))
            else:
                self._tried.append((index, compiled(key), key))

    def of(self, module: str) -> str:
        limit, found = self._exact.get(module, (len(self._tried) + len(self._exact), module))
        for index, pattern, key in self._tried:
            if index > limit:
                break
            if pattern.match(module):
                return key
        return found


def _initialised_at_any_rank(raw: dict[str, Any]) -> dict[str, Any]:
    fits_few = raw.get("init_lora_weights") in _FIT_FEW_RANKS
    return {**raw, "init_lora_weights": True} if fits_few else raw


def _alpha_for(scaling: float, rank: int) -> int | float:
    """The lora_alpha for which alpha / rank is the scaling, to the last bit where one exists."""
    alpha = scaling * rank
    above, below = math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)
    nearby = (float(round(alpha)), alpha, above, below)
    exact = next((value for value in nearby if value / rank == scaling), alpha)
    return int(exact) if float(exact).is_integer() else exact


def _exceptions(values: Mapping[str, Any], default: object) -> dict[str, Any]:
    return {
        "^" + re.escape(module): value for module, value in sorted(values.items()) if value != default
    }


def _exact_targets(modules: list[str]) -> list[str] | str:
    # PEFT matches the names of a list as suffixes too, which a name without a dot would abuse.
    if all("." in module for module in modules):
        return modules
    return "|".join(re.escape(module) for module in modules)
