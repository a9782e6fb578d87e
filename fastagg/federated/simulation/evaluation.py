"""What is measured: losses on held-out examples, generated answers, and what a rank costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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

Delta = tuple[Tensor, Tensor] | Tensor
"""dW of a module: A (R, n) and B (m, R) with dW = B A, or dW itself in the shape of its weight."""


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


def compare(
    modules: Sequence[str], held: Callable[[str], Delta], received: Mapping[str, Adapter]
) -> tuple[dict[str, list[float]], dict[str, Distance | None]]:
    """What the rank of dW is, and what each client's rank costs.

    Args:
        held: dW of a module, as factors or as a whole, see :data:`Delta`.
        received: client -> what it is handed; adapters that share their memory are measured once.

    Returns:
        Module -> the singular values of dW, falling; those beyond are zero. Convolutions count as
        the matrices (out, in x kernel) that their adapters are of.
        Client -> the distance of its adapter from dW over all modules, those that it lacks counted
        as zero; None where dW is zero. By Eckart and Young, what is beyond its rank is the least.

    In float64, one module at a time. For factors of rank R, and r the ranks of all distinct adapters
    together, O((m + n)(R + r)^2) and (m + n)(R + r) numbers; for a dense dW its SVD.
    """
    distinct = {adapter.flat.data_ptr(): adapter for adapter in received.values()}
    spectra: dict[str, list[float]] = {}
    norms: list[float] = []
    errors: dict[int, list[float]] = {memory: [] for memory in distinct}
    least: dict[int, list[float]] = {memory: [] for memory in distinct}
    for name in modules:
        having = {memory: each for memory, each in distinct.items() if name in each.modules}
        delta = held(name)
        if isinstance(delta, Tensor):
            falling, found = _of_matrix(delta, name, having.values())
        else:
            falling, found = _of_factors(delta, name, having.values())
        spectra[name] = falling.tolist()
        norms.append(float(falling.norm()))
        missed = dict(zip(having, found, strict=True))
        for memory in distinct:
            rank = having[memory].rank(name) if memory in having else 0
            errors[memory].append(missed.get(memory, norms[-1]))
            least[memory].append(float(falling[rank:].norm()))
    norm = math.hypot(*norms)

    def distance(memory: int) -> Distance | None:
        if not norm:
            return None
        return Distance(math.hypot(*errors[memory]) / norm, math.hypot(*least[memory]) / norm)

    return spectra, {name: distance(each.flat.data_ptr()) for name, each in received.items()}


def _of_factors(
    factors: tuple[Tensor, Tensor], name: str, received: Iterable[Adapter]
) -> tuple[Tensor, list[float]]:
    """The singular values of B A, (min(m, n, R),), and |s_k B_k A_k - B A| for each adapter.

    With Q_B an orthonormal basis of the columns of B and of all B_k, and Q_A one for A^T and all A_k^T,
    both are those of the small matrices Q_B^T (..) Q_A. Nothing is squared before it is subtracted: a
    distance is off by rounding, some 1e-15 of the terms that dW is the sum of, however small it is.
    """
    rows, columns = [factors[0]], [factors[1]]
    for adapter in received:
        a, b = adapter.factors(name)
        rows.append(a.double())
        columns.append(b.double() * adapter.scaling(name))
    rank = len(factors[0])
    left = _coordinates(torch.cat(columns, 1), rank)
    right = _coordinates(torch.cat(rows).t(), rank)
    wanted = left[:, :rank] @ right[:, :rank].t()
    errors, start = [], rank
    for each in rows[1:]:
        own = slice(start, start + len(each))
        errors.append(float(torch.addmm(wanted, left[:, own], right[:, own].t(), beta=-1).norm()))
        start = own.stop
    # dW comes first in both bases: all else of its coordinates is zero.
    return torch.linalg.svdvals(wanted[:rank, :rank]), errors


def _coordinates(columns: Tensor, rank: int) -> Tensor:
    """The coordinates (.., N) of columns (k, N) in a basis that begins with one of the first ``rank``.

    Where these fill the space, the basis is the one that they are given in.
    """
    return columns if len(columns) <= rank else torch.linalg.qr(columns, mode="r").R


def _of_matrix(
    delta: Tensor, name: str, received: Iterable[Adapter]
) -> tuple[Tensor, list[float]]:
    """:func:`_of_factors` of a dW that is dense, in the shape of its weight."""
    delta = delta.double()
    errors = [float((each.delta(name, torch.float64) - delta).norm()) for each in received]
    return torch.linalg.svdvals(delta.flatten(1)), errors


def similarity(updates: Sequence[ClientUpdate]) -> list[list[float]]:
    """The cosines between clients' s B A, over all modules together; 0 against an update of zero.

    One module at a time: in memory are its clients' factors, twice in float32, and what
    ``ops.update_gram`` takes for them.
    """
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
