"""A LoRA adapter put into a live model by PEFT, and the model taken back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastagg.adapter import Adapter
from fastagg.errors import InvalidInput
from fastagg.federated.clients.fresh_factors import draw_factors
from fastagg.federated.seeds import seeded
from fastagg.peft_format.config import AdapterConfig

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER = "default"  # PEFT's own name for an adapter that was given none


@contextmanager
def placed(network: nn.Module, start: Adapter | AdapterConfig | Any, seed: int) -> Iterator[PeftModel]:
    """``network`` with an adapter in place, in evaluation mode; see :meth:`LocalModel.adapter`.

    Raises:
        InvalidInput: an adapter or a configuration that does not fit the network.
    """
    given = start if isinstance(start, Adapter) else None
    config = given.config if given else _fresh_config(start)
    children = [
        (parent, name, child) for parent in network.modules() for name, child in parent.named_children()
    ]
    try:
        model = _put_in_place(network, _for_peft(config, network, given), given)
        if given is None:
            draw_factors(model, seed)
        else:
            _load(model, given)
        # PEFT's layers come in training mode: their dropout would be on.
        yield model.eval()
    finally:
        # As PEFT's unload() does, and also where PEFT gave up half-way.
        for parent, name, child in children:
            if getattr(parent, name) is not child:
                setattr(parent, name, child)
        if hasattr(network, "peft_config"):
            del network.peft_config
        network.requires_grad_(False).eval()


def _fresh_config(config: Any) -> AdapterConfig:
    if isinstance(config, AdapterConfig):
        parsed = config
    else:
        parsed = AdapterConfig.from_dict(config.to_dict() if hasattr(config, "to_dict") else config)
    initial = parsed.raw.get("init_lora_weights", True)
    if initial is not True:
        raise InvalidInput(
            "fresh factors are drawn here, from the run's seed",
            field="init_lora_weights",
            expected=True,
            got=repr(initial),
            cure="Leave the field unset",
        )
    return parsed


def _for_peft(config: AdapterConfig, network: nn.Module, given: Adapter | None) -> LoraConfig:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    if config.changes_base is not None:
        raise InvalidInput(
            "putting this adapter in place would change the base weights",
            client=given.name if given else None,
            field="init_lora_weights",
            expected="an initialisation that leaves them alone",
            got=repr(config.raw["init_lora_weights"]),
            cure="Convert the adapter first: "
            "save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    # PEFT draws first factors, which are overwritten, and by some rules only at certain ranks.
    fields = {**config.raw, "inference_mode": False, "init_lora_weights": True}
    fields["base_model_name_or_path"] = getattr(network, "name_or_path", None) or None
    if given is None and any(isinstance(module, Conv1D) for module in network.modules()):
        fields["fan_in_fan_out"] = True
    made: LoraConfig = LoraConfig.from_peft_type(**fields)  # type: ignore[no-untyped-call]
    return made


def _put_in_place(network: nn.Module, config: LoraConfig, given: Adapter | None) -> PeftModel:
    from peft import get_peft_model

    with seeded(0, next(network.parameters()).device):
        try:
            return get_peft_model(network, config, adapter_name=ADAPTER)
        except ValueError as error:
            raise InvalidInput(
                f"PEFT cannot put the adapter in place: {error}",
                client=given.name if given else None,
                field="target_modules",
                cure="Choose target_modules among the model's own modules",
            ) from error


def _load(model: PeftModel, adapter: Adapter) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    adapter.check_unchanged()
    tensors = adapter.state_dict()
    state = {span.key: tensors[span.source] for span in adapter.layout.tensors}
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    require_same_tensors(own, state, field="state_dict", client=adapter.name)
    set_peft_model_state_dict(model, state, adapter_name=ADAPTER)


def require_same_tensors(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, field: str, client: str | None = None
) -> None:
    """Raises InvalidInput, naming the first, where two sets of tensors differ in names or shapes."""
    own_shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    for name in sorted(own_shapes.keys() | shapes.keys()):
        if own_shapes.get(name) != shapes.get(name):
            raise InvalidInput(
                "not of this model",
                client=client,
                field=f"{field}[{name!r}]",
                expected=own_shapes.get(name, "no such tensor"),
                got=shapes.get(name, "no such tensor"),
                cure="Give what belongs to the same base model, with the same target_modules",
            )
