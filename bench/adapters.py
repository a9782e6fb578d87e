"""Adapters of a whole model on disk, as PEFT writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

FLORA_RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)  # the paper's ten clients


def write_clients(
    root: Path,
    ranks: tuple[int, ...],
    *,
    layers: int,
    projections: tuple[str, ...] = ("q_proj", "v_proj"),
    size: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> list[Path]:
    """One folder a client: Gaussian factors, the hard case (a flat spectrum), alpha = 2r."""
    generator = torch.Generator().manual_seed(seed)
    folders = []
    for k, rank in enumerate(ranks):
        tensors = {}
        for layer in range(layers):
            for projection in projections:
                key = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
                a = torch.randn(rank, size, generator=generator) / size**0.5
                b = torch.randn(size, rank, generator=generator) / rank**0.5
                tensors[f"{key}.lora_A.weight"] = a.to(dtype)
                tensors[f"{key}.lora_B.weight"] = b.to(dtype)
        folder = root / f"client-{k:03d}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": "benchmark",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": list(projections),
            "lora_dropout": 0.0,
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders
