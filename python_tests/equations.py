"""The methods' equations in float64, written apart from the package, and random clients for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from adapters import make_config, make_state_dict

from fastagg.adapter import Adapter
from fastagg.update import ClientUpdate

SHAPES = {
    "model.layers.0.attn.q_proj": (24, 16),
    "model.layers.0.attn.v_proj": (8, 16),
    "model.layers.0.mlp.up": (40, 24),
    "model.layers.1.attn.q_proj": (24, 16),
    "model.layers.1.attn.v_proj": (8, 16),
    "model.layers.1.mlp.up": (40, 24),
}
EMBEDDING = "model.embed_tokens"
CONV = "model.patch"
SAVED = "base_model.model.score.weight"


@dataclass(frozen=True)
class Client:
    """One client of a round, and the numbers that it sent."""

    name: str
    weight: float
    adapter: Adapter

    @property
    def update(self) -> ClientUpdate:
        return ClientUpdate(self.adapter, weight=self.weight, client_id=self.name)

    @property
    def modules(self) -> tuple[str, ...]:
        return self.adapter.modules

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, n) and B (m, r) in float64, out of the state dict."""
        state = {key.split("base_model.model.")[1]: t for key, t in self.adapter.state_dict().items()}
        if f"{module}.lora_embedding_A" in state:
            a, b = state[f"{module}.lora_embedding_A"], state[f"{module}.lora_embedding_B"]
        else:
            a, b = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
        return a.double().flatten(1), b.double().flatten(1)

    def delta(self, module: str) -> torch.Tensor:
        """s B A, (m, n) in float64."""
        a, b = self.factors(module)
        return self.adapter.scaling(module) * b @ a


def client(
    name: str,
    rank: int = 8,
    *,
    weight: float = 1.0,
    seed: int = 0,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    modules: Mapping[str, tuple[int, int]] = SHAPES,
    special: bool = False,
    saved: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    base_model: str | None = "tiny",
    prefix: str = "base_model.model.",
    zero_b: bool = False,
) -> Client:
    """A client with random factors.

    Args:
        special: an embedding of 30 x 12 and a Conv2d of (10, 6, 3, 2) besides.
        saved: a whole tensor, as modules_to_save has it.
    """
    generator = torch.Generator().manual_seed(seed)
    state = make_state_dict(modules, rank, dtype, seed, rank_pattern, prefix)
    extra: dict[str, torch.Tensor] = {}
    if special:
        extra[f"{EMBEDDING}.lora_embedding_A"] = torch.randn(rank, 30, generator=generator)
        extra[f"{EMBEDDING}.lora_embedding_B"] = torch.randn(12, rank, generator=generator)
        extra[f"{CONV}.lora_A.weight"] = torch.randn(rank, 6, 3, 2, generator=generator)
        extra[f"{CONV}.lora_B.weight"] = torch.randn(10, rank, 1, 1, generator=generator)
    if saved:
        extra["score.weight"] = torch.randn(5, 24, generator=generator)
    state.update({prefix + key: value.to(dtype) for key, value in extra.items()})
    if zero_b:
        state = {key: value * 0 if "lora_B" in key else value for key, value in state.items()}
    config = make_config(
        modules,
        rank,
        2.0 * rank if alpha is None else alpha,
        rank_pattern,
        alpha_pattern,
        use_rslora,
        base_model,
        {
            "target_modules": [*modules, *([EMBEDDING, CONV] if special else [])],
            "modules_to_save": ["score"] if saved else None,
        },
    )
    return Client(name, weight, Adapter(state, config, name=name))


def mixed_round(seed: int, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> list[Client]:
    """Five clients that differ in all that clients may differ in."""
    some = dict(list(SHAPES.items())[:4])
    pattern = {"q_proj": 5, r"layers.1.attn.v_proj": 3}
    options: list[dict[str, object]] = [
        {"rank": 8, "weight": 120, "special": True, "saved": True},
        {"rank": 4, "weight": 30.5, "alpha": 3.0, "special": True},
        {"rank": 16, "weight": 75, "use_rslora": True, "saved": True},
        {"rank": 2, "weight": 1, "modules": some, "base_model": None},
        {"rank": 6, "weight": 64, "rank_pattern": pattern, "alpha_pattern": {"up": 7.0}},
    ]
    return [
        client(f"c{k}", seed=seed + k, dtype=dtypes[k % len(dtypes)], **option)  # type: ignore[arg-type]
        for k, option in enumerate(options)
    ]


def all_modules(clients: Sequence[Client]) -> list[str]:
    return sorted({module for each in clients for module in each.modules})


def shares(clients: Sequence[Client], module: str, missing: str) -> dict[str, float]:
    """p_kj of the clients that have the module."""
    having = [each for each in clients if module in each.modules]
    total = sum(each.weight for each in (clients if missing == "zero" else having))
    return {each.name: each.weight / total for each in having}


def exact(
    clients: Sequence[Client], module: str, missing: str = "renormalise"
) -> torch.Tensor:
    """dW = sum_k p_kj s_kj B_kj A_kj."""
    share = shares(clients, module, missing)
    terms = [share[each.name] * each.delta(module) for each in clients if each.name in share]
    return torch.stack(terms).sum(0)


def padded_means(
    clients: Sequence[Client], module: str, share: Mapping[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_k p_k [A_k; 0] and sum_k p_k s_k [B_k 0]."""
    having = [each for each in clients if each.name in share]
    largest = max(each.adapter.rank(module) for each in having)
    a, b = having[0].factors(module)
    mean_a = torch.zeros(largest, a.shape[1], dtype=torch.float64)
    mean_b = torch.zeros(b.shape[0], largest, dtype=torch.float64)
    for each in having:
        a, b = each.factors(module)
        mean_a[: a.shape[0]] += share[each.name] * a
        mean_b[:, : a.shape[0]] += share[each.name] * each.adapter.scaling(module) * b
    return mean_a, mean_b


def norm_shares(clients: Sequence[Client], module: str) -> dict[str, float]:
    """|s_k B_k A_k|_F / sum, HetLoRA's weights."""
    norms = {
        each.name: float(each.delta(module).norm())
        for each in clients
        if module in each.modules and each.weight > 0
    }
    return {name: norm / sum(norms.values()) for name, norm in norms.items()}


def optimal_error(matrix: torch.Tensor, rank: int) -> float:
    """The least distance of a matrix of this rank (Eckart and Young)."""
    values = torch.linalg.svdvals(matrix)
    return float(values[rank:].norm())


def as_matrix(delta: torch.Tensor, like: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A delta in the base weight's shape as the (m, n) matrix of the equations."""
    flat = delta.double().reshape(delta.shape[0], -1)
    return (flat.T if transposed else flat).reshape(like.shape)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices as small as these are done before a second thread wakes up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
