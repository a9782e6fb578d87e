"""Adapters and folders in PEFT's format, made from seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastagg.adapter import Adapter

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.1.self_attn.v_proj": (8, 16),
}


def make_config(
    modules: Mapping[str, tuple[int, int]] = MODULES,
    rank: int = 8,
    alpha: float = 16,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    base_model: str | None = "tiny",
    config_extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of an ``adapter_config.json``."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "use_rslora": use_rslora,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        **(config_extra or {}),
    }


def make_state_dict(
    modules: Mapping[str, tuple[int, int]] = MODULES,
    rank: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    prefix: str = "base_model.model.",
    extra_tensors: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Normal factors of the size that training gives: A about 1/sqrt(n), B about 1/sqrt(rank)."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (m, n) in modules.items():
        r = _rank_of(name, rank, rank_pattern or {})
        a = torch.randn(r, n, generator=generator) / n**0.5
        b = torch.randn(m, r, generator=generator) / r**0.5
        state[f"{prefix}{name}.lora_A.weight"] = a.to(dtype)
        state[f"{prefix}{name}.lora_B.weight"] = b.to(dtype)
    state.update(extra_tensors or {})
    return state


def _rank_of(name: str, rank: int, pattern: Mapping[str, int]) -> int:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return rank


def make_adapter(
    modules: Mapping[str, tuple[int, int]] = MODULES,
    rank: int = 8,
    alpha: float = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    prefix: str = "base_model.model.",
    base_model: str | None = "tiny",
    extra_tensors: Mapping[str, torch.Tensor] | None = None,
    config_extra: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Adapter:
    """An adapter in memory; ``modules`` maps names to (m, n) = (out, in)."""
    state = make_state_dict(modules, rank, dtype, seed, rank_pattern, prefix, extra_tensors)
    config = make_config(
        modules, rank, alpha, rank_pattern, alpha_pattern, use_rslora, base_model, config_extra
    )
    return Adapter(state, config, name=name)


def make_folder(
    path: str | Path,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    rank: int = 8,
    alpha: float = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    prefix: str = "base_model.model.",
    base_model: str | None = "tiny",
    extra_tensors: Mapping[str, torch.Tensor] | None = None,
    config_extra: Mapping[str, Any] | None = None,
) -> Path:
    """The same adapter as a folder, written by the safetensors library itself."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = make_state_dict(modules, rank, dtype, seed, rank_pattern, prefix, extra_tensors)
    config = make_config(
        modules, rank, alpha, rank_pattern, alpha_pattern, use_rslora, base_model, config_extra
    )
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts agree in keys, dtypes, shapes and bits, NaN payloads included."""

    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype
        and one[key].shape == two[key].shape
        and raw(one[key]) == raw(two[key])
        for key in one
    )


class Tiny(torch.nn.Module):
    """Every kind of layer that PEFT's LoRA targets, no two of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(6, 10), torch.nn.Linear(10, 7)])
        self.conv1 = torch.nn.Conv1d(3, 5, 4)
        self.conv2 = torch.nn.Conv2d(3, 5, (3, 2))
        self.conv3 = torch.nn.Conv3d(2, 4, (1, 2, 3))
        self.head = torch.nn.Linear(7, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.head(hidden)  # type: ignore[no-any-return]
