"""PEFT's own way: one live model that holds all adapters, and `add_weighted_adapter`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastagg.bench.workload import SCALING

__all__ = ["LiveModel"]

_MERGED = "merged"


class LiveModel:
    """A PEFT model of one linear layer with the clients' adapters, in float32: PEFT's SVD needs it."""

    def __init__(self, As: Sequence[Tensor], Bs: Sequence[Tensor], c: Sequence[float]) -> None:
        from peft import LoraConfig, get_peft_model

        (m, _), (_, n) = Bs[0].shape, As[0].shape
        base = nn.Module()
        base.proj = nn.Linear(n, m, bias=False, device=As[0].device)
        self.names = [f"client{k}" for k in range(len(As))]
        self.weights = [weight / SCALING for weight in c]
        configs = [
            LoraConfig(r=A.shape[0], lora_alpha=int(SCALING * A.shape[0]), target_modules=["proj"])
            for A in As
        ]
        with _quiet():
            model: Any = get_peft_model(base, configs[0], adapter_name=self.names[0])
            for name, config in zip(self.names[1:], configs[1:], strict=True):
                model.add_adapter(name, config)
        self.model = model
        layer: Any = self.model.base_model.model.proj
        with torch.no_grad():
            for name, A, B in zip(self.names, As, Bs, strict=True):
                layer.lora_A[name].weight.copy_(A)
                layer.lora_B[name].weight.copy_(B)

    @torch.no_grad()
    def merge(self, how: Literal["cat", "svd"], rank: int | None = None) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r) of the merged adapter, its scaling in B."""
        with _quiet():
            self.model.add_weighted_adapter(
                self.names, self.weights, _MERGED, combination_type=how, svd_rank=rank
            )
        layer = self.model.base_model.model.proj
        A = layer.lora_A[_MERGED].weight.detach()
        B = layer.lora_B[_MERGED].weight.detach() * layer.scaling[_MERGED]
        self.model.delete_adapter(_MERGED)
        return A, B


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
