"""Run folders written by hand, with figures such as a small run has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = '[federation]\nmethods = ["{method}"]\nrounds = {rounds}\n\n[lora]\ndropout = 0.05\n'
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def round_row(method: str, number: int, loss: float | None, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "round",
        "method": method,
        "round": number,
        "loss": loss,
        "perplexity": None if loss is None else float(np.exp(min(loss, 700.0))),
        "participants": 0,
        "failures": {},
        "exact_match": None,
        "rouge_l": None,
        "seconds": {"train": 0.0, "aggregate": 0.0, "evaluate": 1.4, "other": 0.02},
        "bytes_up": 0,
        "bytes_down": 0,
    } | fields


def client_row(
    method: str, number: int, client: str, rank: int, loss: float | None, **fields: Any
) -> dict[str, Any]:
    return {
        "kind": "client",
        "method": method,
        "round": number,
        "client": client,
        "rank": rank,
        "participated": number > 0,
        "train_loss": None if number == 0 or loss is None else loss + 0.1,
        "steps": 10 if number else 0,
        "held_out_loss": loss,
        "distance": 0.5 / rank if number else None,
        "optimal_distance": 0.4 / rank if number else None,
        "bytes_up": 9216 * rank if number else 0,
        "bytes_down": 9216 * rank if number else 0,
        "train_seconds": 0.7 if number else 0.0,
    } | fields


def rows_of(
    method: str,
    *,
    rounds: int,
    ranks: Mapping[str, int],
    floor: float = 1.1,
    failures: Mapping[int, Mapping[str, str]] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Losses that fall from about ln 256 to `floor`, easier for some clients than for others."""
    draw = np.random.default_rng(seed)
    ease = dict(zip(ranks, draw.normal(0, 0.25, len(ranks)), strict=True))
    made = []
    for number in range(rounds + 1):
        failed = (failures or {}).get(number, {})
        losses = {
            name: floor + (5.4 - floor) * 0.62**number + ease[name] + draw.normal(0, 0.02)
            for name in ranks
        }
        rows = []
        for name, rank in ranks.items():
            fields: dict[str, Any] = {}
            if name in failed:
                fields = {"participated": False, "train_loss": None, "steps": 0, "bytes_up": 0}
            rows.append(client_row(method, number, name, rank, losses[name], **fields))
        trained: dict[str, Any] = {}
        if number:
            trained = {
                "participants": len(ranks) - len(failed),
                "failures": dict(failed),
                "seconds": {
                    "train": 0.7 * len(ranks) + draw.normal(0, 0.2),
                    "aggregate": 0.03 + abs(draw.normal(0, 0.004)),
                    "evaluate": 1.4 + draw.normal(0, 0.05),
                    "other": 0.06,
                },
                "bytes_up": sum(row["bytes_up"] for row in rows),
                "bytes_down": sum(row["bytes_down"] for row in rows) * (3 if method == "flora" else 1),
            }
        made += [round_row(method, number, float(np.mean(list(losses.values()))), **trained), *rows]
    return made


def spectra_of(*, layers: int, kinds: Sequence[str] = KINDS, rank: int = 64) -> dict[str, Any]:
    index = np.arange(rank)
    return {
        "modules": {
            f"model.layers.{layer}.{'self_attn' if place < 4 else 'mlp'}.{kind}": list(
                (0.8 + 0.1 * layer) * np.exp(-index / (6.0 + 1.5 * place + layer)) + 1e-4
            )
            for layer in range(layers)
            for place, kind in enumerate(kinds)
        }
    }


def similarity_of(clients: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed).normal(size=(len(clients), 40)) + 0.35
    draw /= np.linalg.norm(draw, axis=1, keepdims=True)
    return {"clients": list(clients), "cosine": (draw @ draw.T).tolist()}


def write_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: str | None = None,
    spectra: Mapping[str, Any] | None = None,
    similarity: Mapping[str, Any] | None = None,
) -> Path:
    """Such a folder, with spectra and similarity in its last round where they are given."""
    folder.mkdir(parents=True)
    last = max(row["round"] for row in rows)
    (folder / "config.toml").write_text(
        CONFIG.format(method=rows[0]["method"], rounds=last) if config is None else config
    )
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for number in range(1, last + 1):
        place = folder / "rounds" / f"{number:04d}"
        place.mkdir(parents=True)
        if number == last:
            for name, document in (("spectra", spectra), ("similarity", similarity)):
                if document is not None:
                    (place / f"{name}.json").write_text(json.dumps(document))
        (place / "COMPLETE").touch()
    return folder


def whole_run(folder: Path, method: str = "flora", *, rounds: int = 8, **fields: Any) -> Path:
    """A run with everything that a run can have."""
    ranks = dict(zip("abcdefgh", (64, 32, 16, 16, 8, 8, 4, 4), strict=True))
    return write_run(
        folder,
        rows_of(method, rounds=rounds, ranks=ranks, **fields),
        spectra=spectra_of(layers=4),
        similarity=similarity_of(list(ranks)),
    )
