"""Rounds of real adapters: trained by PEFT on tiny models, dW by its equation in float64.

Everything expected is computed from what PEFT itself makes of the clients' folders.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import natural_instructions
import pytest
import torch

import fastagg

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Deltas = dict[str, torch.Tensor]

CLIENTS = ("0019", "0106", "0622")
LENGTH = 48
STEPS = 12
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH)
    return transformers.GPT2LMHeadModel(config)


def lora(rank: int, **options: Any) -> Any:
    options = {"lora_alpha": 2 * rank, "target_modules": ALL, "task_type": "CAUSAL_LM"} | options
    return peft.LoraConfig(r=rank, **options)


@dataclass(frozen=True)
class Scenario:
    model: Callable[[], torch.nn.Module]
    configs: tuple[Any, Any, Any]
    saves_embedding: bool = False


def scenarios() -> dict[str, Scenario]:
    embedding = {
        "target_modules": ["embed_tokens", "q_proj", "v_proj"],
        "modules_to_save": ["lm_head"],
    }
    conv1d = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    return {
        "plain": Scenario(llama, (lora(8), lora(4), lora(2))),
        "scalings": Scenario(
            llama,
            (
                lora(8, lora_alpha=8, use_rslora=True),
                lora(
                    4,
                    lora_alpha=12,
                    rank_pattern={"q_proj": 6, "layers.1.mlp.down_proj": 3},
                    alpha_pattern={"v_proj": 5},
                ),
                lora(2, lora_alpha=3, use_rslora=True, rank_pattern={r".*\.o_proj": 5}),
            ),
        ),
        "modules_lacking": Scenario(
            llama, (lora(4), lora(6, target_modules=["q_proj", "v_proj"]), lora(2))
        ),
        "embedding": Scenario(
            llama,
            (lora(8, **embedding), lora(4, **embedding), lora(3, **embedding)),
            saves_embedding=True,
        ),
        "conv1d": Scenario(gpt2, (lora(8, **conv1d), lora(4, **conv1d), lora(2, **conv1d))),
    }


@dataclass
class Client:
    name: str
    folder: Path
    weight: int
    deltas: Deltas
    ranks: dict[str, int]
    saved: Deltas


@dataclass
class Round:
    """Trained clients on one base (float64), and dW by its equation in float64."""

    base: torch.nn.Module
    clients: list[Client]
    probe: torch.Tensor

    @property
    def updates(self) -> list[fastagg.ClientUpdate]:
        return [fastagg.ClientUpdate.load(c.folder, weight=c.weight) for c in self.clients]

    def mean(self, of: Callable[[Client], Deltas]) -> Deltas:
        """Weighted mean over the clients that have the entry."""
        names = sorted({name for client in self.clients for name in of(client)})
        means = {}
        for name in names:
            owners = [c for c in self.clients if name in of(c)]
            total = sum(c.weight for c in owners)
            means[name] = sum((c.weight / total) * of(c)[name] for c in owners)
        return means

    @property
    def delta(self) -> Deltas:
        return self.mean(lambda c: c.deltas)

    @property
    def saved(self) -> Deltas:
        return self.mean(lambda c: c.saved)

    @property
    def stack_rank(self) -> int:
        return sum(max(c.ranks.values()) for c in self.clients)

    def logits_with(self, delta: Deltas, saved: Deltas) -> torch.Tensor:
        """Of the base model whose weights these were added to, and put into, by hand."""
        model = copy.deepcopy(self.base)
        with torch.no_grad():
            for module, update in delta.items():
                model.get_submodule(module).weight += update
            for name, value in saved.items():
                model.get_parameter(name).copy_(value)
        return logits(model, self.probe)


@torch.no_grad()
def logits(model: torch.nn.Module, probe: torch.Tensor) -> torch.Tensor:
    return model(input_ids=probe, use_cache=False).logits


def peft_model(base: torch.nn.Module, folder: Path) -> Any:
    """The adapter as PEFT loads it, in float64."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).double().eval()


def peft_parts(model: Any) -> tuple[Deltas, dict[str, int], Deltas]:
    """Deltas in the base weights' own shapes, ranks, and the parameters of modules_to_save."""
    deltas, ranks, saved = {}, {}, {}
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        if isinstance(module, peft.tuners.lora.LoraLayer):
            deltas[name] = module.get_delta_weight("default").detach()
            ranks[name] = module.r["default"]
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            own = module.modules_to_save["default"]
            saved |= {f"{name}.{key}": p.detach() for key, p in own.named_parameters()}
    return deltas, ranks, saved


def tokens(texts: tuple[str, ...], windows: int) -> torch.Tensor:
    data = "".join(texts).encode()[: windows * LENGTH]
    return torch.tensor(list(data)).reshape(windows, LENGTH)


def fine_tune(
    base: torch.nn.Module, config: Any, texts: tuple[str, ...], folder: Path, embeds: bool
) -> None:
    model = peft.get_peft_model(copy.deepcopy(base).float(), copy.deepcopy(config))
    batches = tokens(texts, STEPS * 4).split(4)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=2e-2)
    for batch in batches:
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimiser.step()
    model.save_pretrained(str(folder), save_embedding_layers=embeds)


def train_round(scenario: Scenario, folder: Path) -> Round:
    tasks = [natural_instructions.read(client) for client in CLIENTS]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        base = scenario.model().eval()
        clients = []
        for task, config in zip(tasks, scenario.configs, strict=True):
            target = folder / task.client
            fine_tune(base, config, task.train, target, scenario.saves_embedding)
            parts = peft_parts(peft_model(base, target))
            clients.append(Client(task.client, target, task.weight, *parts))
    return Round(base.double(), clients, torch.cat([tokens(t.test, 2) for t in tasks]))
