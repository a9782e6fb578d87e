"""State dicts as clients of the federated codebases send them, and what a round of them has to hand out,
by the equations in float64 and from the keys alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from adapters import make_config
from torch import Tensor

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 20),
    "model.layers.0.mlp.up_proj": (40, 24),
    "model.layers.1.self_attn.q_proj": (24, 20),
    "model.layers.1.mlp.up_proj": (40, 24),
}
RANKS = (2, 4, 8, 16)
WEIGHTS = (120, 30, 75, 11)
ALPHA = 16
CONFIG = make_config(MODULES, rank=8, alpha=ALPHA)

# What stands before the module's name and between factor and "weight".
PEFT_KEYS = ("base_model.model.", "")
LIVE_KEYS = ("base_model.model.", ".default")


@dataclass(frozen=True)
class Sent:
    """One client: what it counts, what it sent, and the alpha that it trained with."""

    weight: float
    state: dict[str, Tensor]
    alpha: float = ALPHA


def state_dict(
    rank: int,
    seed: int,
    keys: tuple[str, str] = PEFT_KEYS,
    *,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Normal factors; ``keys``: what stands before the module, and the adapter's name."""
    prefix, adapter = keys
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for module, (m, n) in modules.items():
        a = torch.randn(rank, n, generator=draw) / n**0.5
        b = torch.randn(m, rank, generator=draw) / rank**0.5
        state[f"{prefix}{module}.lora_A{adapter}.weight"] = a.to(dtype)
        state[f"{prefix}{module}.lora_B{adapter}.weight"] = b.to(dtype)
    return state


def clients(
    keys: Sequence[tuple[str, str]] = (PEFT_KEYS,),
    ranks: Sequence[int] = RANKS,
    weights: Sequence[float] = WEIGHTS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Sent]:
    return [
        Sent(weight, state_dict(rank, seed + place, keys[place % len(keys)], dtype=dtype))
        for place, (rank, weight) in enumerate(zip(ranks, weights, strict=True))
    ]


def factors(state: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    """A and B in float64, whatever stands around the module's name."""
    found = {
        side: tensor.double()
        for key, tensor in state.items()
        for side in ("A", "B")
        if f"{module}.lora_{side}." in key
    }
    return found["A"], found["B"]


def delta(state: Mapping[str, Tensor], module: str, alpha: float = ALPHA) -> Tensor:
    """What a model of this adapter adds to its weight: alpha / r B A, in float64."""
    a, b = factors(state, module)
    return alpha / len(a) * b @ a


def exact(sent: Sequence[Sent], module: str) -> Tensor:
    """dW = sum_k p_k s_k B_k A_k."""
    total = sum(each.weight for each in sent)
    terms = [each.weight / total * delta(each.state, module, each.alpha) for each in sent]
    return torch.stack(terms).sum(0)


def check_optimal(
    handed: Mapping[str, Tensor],
    sent: Sequence[Sent],
    before: Mapping[str, Tensor],
    *,
    alpha: float = ALPHA,
    tolerance: float = 1e-5,
) -> None:
    """Whether a hand-out is the best approximation of dW (Eckart and Young) at the rank that the state
    dict ``before`` has, under its keys and in its shapes and dtypes."""
    assert handed.keys() == before.keys()
    for key, tensor in before.items():
        assert (handed[key].shape, handed[key].dtype) == (tensor.shape, tensor.dtype)
    for module in MODULES:
        dw = exact(sent, module)
        rank = len(factors(before, module)[0])
        best = float(torch.linalg.svdvals(dw)[rank:].norm())
        error = float((delta(handed, module, alpha) - dw).norm())
        assert error <= best + tolerance * float(dw.norm())


def bits(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """To see whether an argument was changed."""
    return {key: tensor.view(torch.uint8).numpy().tobytes() for key, tensor in state.items()}


def parameters(hook: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """What a caller has to know of a signature: names, defaults and kinds in their order."""
    return [(p.name, p.default, p.kind) for p in inspect.signature(hook).parameters.values()]
