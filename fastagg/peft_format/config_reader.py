"""Reads the fields of an ``adapter_config.json``: which are handled, harmless or refused, and why.

The tables cover every field of ``peft.LoraConfig`` (0.21); the tests hold them against it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from fastagg.errors import InvalidInput, short

__all__ = ["CONFIG_NAME", "HANDLED", "HARMLESS", "REFUSED", "ConfigReader"]

CONFIG_NAME = "adapter_config.json"

_PLAIN = "Train these clients with plain LoRA (leave the field unset)"
_MODULES = "Target whole modules with target_modules or modules_to_save instead"

# Fields that make the update something other than scaling * B A on the base model's own weights.
REFUSED = {
    "use_dora": ("DoRA rescales W + B A by a trained magnitude, so its update is not B A", _PLAIN),
    "lora_bias": ("the bias of lora_B is not part of B A", _PLAIN),
    "use_qalora": ("QALoRA pools the input before A, so its update is not B A", _PLAIN),
    "use_bdlora": ("BD-LoRA stores block-diagonal factors, so its update is not B A", _PLAIN),
    "kasa_config": ("KaSA puts a diagonal between B and A and truncates the base weight", _PLAIN),
    "monteclora_config": ("MonteCLoRA perturbs the factors at random", _PLAIN),
    "velora_config": ("VeLoRA keeps a projection in the file that is neither A nor B", _PLAIN),
    "arrow_config": ("Arrow routes tokens between several adapters", _PLAIN),
    "alora_invocation_tokens": ("aLoRA applies B A to some tokens only", _PLAIN),
    "enable_lora": (
        "merged projections (PEFT 0.1) interleave several updates in one B A",
        "Convert the adapter with a current PEFT",
    ),
    "layer_replication": (
        "replicated layers do not exist among the base model's weights",
        "Fine-tune the expanded model as a base model of its own",
    ),
    "target_parameters": ("LoRA on bare parameters is not supported", _MODULES),
    "trainable_token_indices": ("single trained token rows are not supported", _MODULES),
}

# Fields which leave the update scaling * B A whatever they hold: they steer training, name things,
# choose modules (the tensors say which), or speak only when another field listed here does.
HARMLESS = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "modules_to_save",
        "bias",
        "layers_to_transform",
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "merge_weights",
    }
)
# Fields that this package reads.
HANDLED = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "fan_in_fan_out",
        "init_lora_weights",
        "ensure_weight_tying",
    }
)

# Initialisations that leave the base weights alone, and those that move a part of them into B A,
# with the sub-configuration that decides which part.
_KEEPS_BASE = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
_CHANGES_BASE = re.compile(r"pissa|pissa_niter_\d+|olora|corda|loftq|lora_ga")
_DECIDED_BY = {"corda": "corda_config", "loftq": "loftq_config", "lora_ga": "lora_ga_config"}


class ConfigReader:
    """Reads one raw configuration; each method raises InvalidInput where PEFT could not use it."""

    def __init__(self, raw: Mapping[str, Any], client: str | None) -> None:
        self._client = client
        if not isinstance(raw, Mapping):
            raise self._error(
                "the configuration is not an object of fields",
                CONFIG_NAME,
                expected="a JSON object",
                got=type(raw).__name__,
                cure="Save the adapter again with save_pretrained",
            )
        self.raw: dict[str, Any] = _jsonable(raw)
        try:
            json.dumps(self.raw)
        except (TypeError, ValueError) as error:
            raise self._error(f"not JSON: {error}", CONFIG_NAME) from None

    def _error(
        self,
        problem: str,
        field: str,
        *,
        expected: object = None,
        got: object = None,
        cure: str | None = None,
    ) -> InvalidInput:
        return InvalidInput(
            problem, client=self._client, field=field, expected=expected, got=got, cure=cure
        )

    def refuse_other_types(self) -> None:
        """Only LoRA: every other PEFT type has an update of another form."""
        kind = self.raw.get("peft_type")
        if kind != "LORA":
            raise self._error(
                "not a LoRA adapter",
                "peft_type",
                expected="'LORA'",
                got="no such field" if kind is None else short(kind),
                cure="FastAgg aggregates adapters that PEFT's LoraConfig describes",
            )

    def refuse_variants(self) -> None:
        """Refuses the fields of ``REFUSED`` where set, and unknown ones that switch something on.

        PEFT switches its variants on by a flag, a sub-configuration or a list. Unknown numbers and
        texts pass: they only parametrise such, and every new version of PEFT adds a few.
        """
        for field, value in self.raw.items():
            if field in REFUSED and value not in (None, False, []):
                reason, cure = REFUSED[field]
                raise self._error(reason, field, expected="unset", got=short(value), cure=cure)
            known = field in HARMLESS or field in HANDLED or field in REFUSED
            if not known and value and isinstance(value, (bool, dict, list)):
                raise self._error(
                    "an unknown field, which may make the update something other than B A",
                    field,
                    expected="unset",
                    got=short(value),
                    cure=f"If the adapter is plain LoRA, remove the field from {CONFIG_NAME}",
                )

    def text(self, field: str) -> str | None:
        """A text, None where it is absent, null or empty."""
        value = self.raw.get(field)
        if value is not None and not isinstance(value, str):
            raise self._error("not a text", field, expected="a text or null", got=short(value))
        return value or None

    def flag(self, field: str) -> bool:
        """A flag, False where it is absent or null."""
        value = self.raw.get(field)
        if value is not None and not isinstance(value, bool):
            raise self._error("not a flag", field, expected="true or false", got=short(value))
        return bool(value)

    def rank(self, value: Any, field: str) -> int:
        """A rank: an integer >= 1."""
        if not is_integer(value) or value < 1:
            raise self._error("not a rank", field, expected="an integer >= 1", got=short(value))
        return int(value)

    def alpha(self, value: Any, field: str) -> float:
        """A lora_alpha: not zero, and of a size that float32 factors can be multiplied by and
        divided by, else no update could be handed back through it."""
        number = math.nan
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer of any length is JSON
                number = float(value)
        if not 1e-30 <= abs(number) <= 1e30:
            raise self._error(
                "not a usable lora_alpha",
                field,
                expected="a number other than 0, between 1e-30 and 1e30 in size",
                got=short(value),
                cure="Its scaling is alpha / r, and updates are divided by it on the way back",
            )
        return value  # type: ignore[no-any-return]

    def pattern(self, field: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
        """A mapping from regular expressions to values that ``check`` accepts."""
        value = self.raw.get(field)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._error("not a mapping", field, expected="an object", got=short(value))
        for key in value:
            try:
                compiled(key)
            except re.error as error:
                problem = f"not a regular expression: {error}"
                raise self._error(problem, field, got=short(key)) from None
        return {key: check(item, f"{field}[{key!r}]") for key, item in value.items()}

    def changes_base(self) -> str | None:
        """What fixes the base weights that the initialisation left; None where it left them alone.

        That is the method, its own sub-configuration and the ranks (PiSSA takes the first r
        singular triples out of W), as one comparable text.
        """
        init = self.raw.get("init_lora_weights", True)
        name = str(init).lower()
        if name in _KEEPS_BASE:
            return None
        if not _CHANGES_BASE.fullmatch(name):
            raise self._error(
                "an unknown initialisation, which may have changed the base weights",
                "init_lora_weights",
                expected="one that PEFT 0.21 knows",
                got=short(init),
                cure="If it leaves the base weights alone, set the field to true",
            )
        fields = ["r", "rank_pattern", *filter(None, [_DECIDED_BY.get(name)])]
        basis = {field: self.raw.get(field) for field in fields}
        return f"{name} {json.dumps(basis, sort_keys=True)}"


def compiled(key: str) -> re.Pattern[str]:
    """A key of rank_pattern or alpha_pattern as PEFT's ``get_pattern_key`` matches it."""
    return re.compile(rf"(.*\.)?({key})$")


def is_integer(value: object) -> bool:
    """Whether a JSON value is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_jsonable(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value
