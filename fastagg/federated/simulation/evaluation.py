"""What is measured: losses on held-out examples, generated answers, and what a rank costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fastagg import ops
from fastagg.adapter import Adapter
from fastagg.federated.clients.token_loss import TokenLoss
from fastagg.federated.data.examples import Example
from fastagg.federated.data.prompt import PromptTemplate, Tokeniser, encode_prompt
from fastagg.update import ClientUpdate


@dataclass(frozen=True)
class Answers:
    """Scores of generated answers in [0, 1], means over the examples."""

    exact_match: float
    rouge_l: float


@dataclass(frozen=True)
class Distance:
    """|received - dW| / |dW| over all modules, and the least that any adapter of its ranks has."""

    received: float
    optimal: float


def together(losses: Sequence[TokenLoss]) -> TokenLoss:
    """One loss over the tokens of all."""
    return TokenLoss(sum(each.total for each in losses), sum(each.tokens for each in losses))


def perplexity(loss: TokenLoss) -> float:
    """exp of the nats per token; infinite where that overflows."""
    try:
        return math.exp(loss.mean)
    except OverflowError:
        return math.inf


@torch.no_grad()
def answer(network: nn.Module, prompt: Tensor, *, new_tokens: int, tokeniser: Tokeniser) -> str:
    """The most likely next token, again and again, until the model ends its answer.

    Args:
        prompt: (tokens,) int64.
    """
    device = next(network.parameters()).device
    ids = prompt[None].to(device)
    generate: Any = network.generate
    made = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokeniser.end,
        pad_token_id=tokeniser.end,
    )
    fresh: list[int] = made[0, len(prompt) :].tolist()
    return tokeniser.decode(fresh[: fresh.index(tokeniser.end)] if tokeniser.end in fresh else fresh)


def score(
    network: nn.Module,
    questions: Sequence[Example],
    template: PromptTemplate,
    tokeniser: Tokeniser,
    *,
    length: int,
    new_tokens: int,
) -> list[Answers]:
    """The answers to some questions against their outputs, one by one.

    ROUGE-L is rouge-score's F-measure with stemming, as in the evaluation of Natural Instructions; an
    exact match disregards white space at both ends.
    """
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    # A model that embeds positions has no more of them than this, the answer's among them.
    config: Any = network.config
    context = getattr(config, "max_position_embeddings", None) or length + new_tokens
    room = min(length, max(1, context - new_tokens))
    scores = []
    for question in questions:
        prompt = encode_prompt(question, template, tokeniser, room)
        text = answer(network, prompt, new_tokens=new_tokens, tokeniser=tokeniser).strip()
        wanted = question.output.strip()
        scores.append(Answers(float(text == wanted), rouge.score(wanted, text)["rougeL"].fmeasure))
    return scores


def mean_answers(scores: Sequence[Answers]) -> Answers | None:
    """The means over all examples; None where there is none."""
    if not scores:
        return None
    return Answers(fmean(s.exact_match for s in scores), fmean(s.rouge_l for s in scores))


def spectra(modules: Sequence[str], delta: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Module -> the singular values of its dW, falling; float64, on the CPU.

    Convolutions count as the matrices (out, in x kernel) that their adapters are of.
    """
    return {name: torch.linalg.svdvals(delta(name).double().flatten(1)) for name in modules}


def distance(
    received: Adapter, delta: Callable[[str], Tensor], values: Mapping[str, Tensor]
) -> Distance | None:
    """How far an adapter is from dW, in float64; None where dW is zero.

    Args:
        delta: dW of a module, in the shape of its weight.
        values: its singular values, see :func:`spectra`. By Eckart and Young, what is beyond the
            adapter's rank is the least error.
    """
    error = least = norm = 0.0
    for name, falling in values.items():
        wanted = delta(name).double()
        norm += float(wanted.square().sum())
        if name in received.modules:
            error += float((received.delta(name).double() - wanted).square().sum())
            least += float(falling[received.rank(name) :].square().sum())
        else:
            error += float(wanted.square().sum())
            least += float(wanted.square().sum())
    return Distance(math.sqrt(error / norm), math.sqrt(least / norm)) if norm else None


def similarity(updates: Sequence[ClientUpdate]) -> list[list[float]]:
    """The cosines between clients' s B A, over all modules together; 0 against an update of zero."""
    clients = len(updates)
    gram = torch.zeros(clients, clients, dtype=torch.float64)
    for name in sorted({module for update in updates for module in update.adapter.modules}):
        having = [i for i, update in enumerate(updates) if name in update.adapter.modules]
        pairs = [updates[i].adapter.factors(name) for i in having]
        ranks = torch.tensor([len(a) for a, _ in pairs])
        scalings = torch.tensor([updates[i].adapter.scaling(name) for i in having], dtype=torch.float64)
        gram += ops.update_gram(
            torch.cat([a.float() for a, _ in pairs])[None],
            torch.cat([b.float().t() for _, b in pairs])[None].contiguous(),
            scalings.repeat_interleave(ranks)[None],
            torch.tensor(having).repeat_interleave(ranks)[None],
            clients=clients,
        )[0]
    norms = gram.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    cosines: list[list[float]] = (gram * scale * scale[:, None]).tolist()
    return cosines
