"""The main job from end to end: a base model, its clients, every method, and what came of it."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from fastagg.demo.clients import Client, deltas, loaded, train_client
from fastagg.demo.outcome import MethodOutcome, Outcome
from fastagg.demo.progress import Stages
from fastagg.demo.reference import Exact
from fastagg.demo.rounds import loss_with, run_round
from fastagg.demo.settings import FULL, METHODS, QUICK, Settings
from fastagg.demo.table import clients_table, methods_table, refusals
from fastagg.errors import FastAggError
from fastagg.federated.clients.llama import loss_on, new_llama, train
from fastagg.federated.data.corpus import ClientText, client_texts, language_reference

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

RESULT = "demo.json"  # also the mark by which a later run knows the folder as its own
WEIGHTS = "weights.json"
INTERRUPTED = 130


def run_demo(
    out: Path, seed: int = 0, quick: bool = False, *, console: Console | None = None
) -> Outcome:
    """Trains a base model and its clients, aggregates them by each method, prints what came of it.

    Everything lies under ``out`` afterwards: ``base/``, ``clients/<name>/``, ``weights.json``,
    ``<method>/`` and ``demo.json``; those of an earlier demo are replaced. Nothing is fetched: the
    text is the standard library's. About two minutes on two cores; seconds with ``quick``, which
    has a small model, three clients and makes no claim to sound training. The same seed gives the
    same adapters, bit for bit, on the same machine and number of threads.

    Raises:
        FastAggError: ``out`` holds something else, PEFT or transformers is not installed, or
            this Python lacks the sources of its standard library.
        SystemExit: interrupted from the keyboard, after a sentence saying so (code 130).
    """
    stages = Stages(console or Console())
    settings = QUICK if quick else FULL
    try:
        _require_training_libraries()
        _claim(out)
        with warnings.catch_warnings():
            # transformers and PEFT warn of each other's deprecations.
            warnings.simplefilter("ignore", FutureWarning)
            outcome = _run(out, seed, settings, stages)
    except KeyboardInterrupt:
        stages.say(f"Interrupted. What was finished lies in {out}; a new run starts over.")
        raise SystemExit(INTERRUPTED) from None
    outcome.save(out / RESULT)
    _show(outcome, out, stages)
    return outcome


def _run(out: Path, seed: int, settings: Settings, stages: Stages) -> Outcome:
    texts = client_texts(
        len(settings.ranks), length=settings.length, windows=settings.held_out_windows, seed=seed
    )
    held_out = torch.cat([text.held_out for text in texts])
    base = _trained_base(out / "base", seed, settings, stages)
    loss_before = float(loss_on(base, held_out).mean())
    clients = _trained_clients(base, texts, out, seed, settings, stages)
    (out / WEIGHTS).write_text(json.dumps({c.name: c.weight for c in clients}, indent=2) + "\n")

    with stages("dW in float64", len(clients)) as advance:
        exact = _exact(base, clients, advance)
        loss_exact = loss_with(base, exact, held_out)
    methods: list[MethodOutcome] = []
    for method in METHODS:
        with stages(method, len(set(settings.ranks))) as advance:
            outcome = run_round(
                method,
                clients,
                out / method,
                base=base,
                base_folder=out / "base",
                held_out=held_out,
                exact=exact,
                on_hand_out=advance,
            )
        methods.append(outcome)
    return Outcome(
        seed=seed,
        parameters=base.num_parameters(),
        loss_before=loss_before,
        loss_exact=loss_exact,
        clients=tuple(clients),
        methods=tuple(methods),
        seconds=stages.seconds,
    )


def _trained_base(folder: Path, seed: int, settings: Settings, stages: Stages) -> LlamaForCausalLM:
    training = settings.pre_training
    with stages("base model", training.steps) as advance:
        base = new_llama(settings.shape, length=settings.length, seed=seed)
        text = language_reference()
        losses = train(base, text, training, length=settings.length, seed=seed, on_step=advance)
        base.save_pretrained(str(folder))
        # PEFT writes it into adapter_config.json as the model that the adapters belong to.
        base.name_or_path = str(folder)
    stages.say(
        f"base model: {base.num_parameters() / 1e6:.2f} M parameters, loss on the language "
        f"reference {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte"
    )
    return base


def _trained_clients(
    base: LlamaForCausalLM,
    texts: list[ClientText],
    out: Path,
    seed: int,
    settings: Settings,
    stages: Stages,
) -> list[Client]:
    clients: list[Client] = []
    with stages("clients", len(texts) * settings.fine_tuning.steps) as advance:
        for index, text in enumerate(texts):
            folder = out / "clients" / text.name
            client = train_client(
                base, texts, index, settings, seed=seed, folder=folder, on_step=advance
            )
            stages.say(
                f"client {client.name}: rank {client.rank}, loss on its own held-out text "
                f"{client.own_before:.2f} -> {client.own_after:.2f}"
            )
            clients.append(client)
    return clients


def _exact(base: LlamaForCausalLM, clients: list[Client], advance: Callable[[], None]) -> Exact:
    updates = []
    for client in clients:
        with loaded(base, Path(client.folder)) as model:
            updates.append((float(client.weight), deltas(model)))
        advance()
    return Exact.of(updates)


def _show(outcome: Outcome, out: Path, stages: Stages) -> None:
    stages.console.print(clients_table(outcome.clients, outcome.loss_before))
    stages.console.print(methods_table(outcome))
    for line in refusals(outcome.methods):
        stages.say(line)
    stages.say(
        f"\nThe folders are in {out}: base/, clients/, one per method, and {RESULT} with all "
        f"figures. The same by hand, and a look inside:\n"
        f"  fastagg aggregate {out}/clients/* --weights {out}/{WEIGHTS} --method flexlora "
        f"--out {out}/again\n"
        f"  fastagg inspect {out}/clients/*\n"
        f"{sum(outcome.seconds.values()):.0f} seconds, of which "
        + ", ".join(f"{name} {value:.0f}" for name, value in outcome.seconds.items() if value >= 1)
    )


def _require_training_libraries() -> None:
    missing = [name for name in ("peft", "transformers") if find_spec(name) is None]
    if missing:
        raise FastAggError(
            f"the demo trains real adapters and needs {' and '.join(missing)}: "
            "pip install 'fastagg[peft]'"
        )
    # Read when huggingface_hub is first imported; nothing here is on the hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _claim(out: Path) -> None:
    """Makes ``out`` an empty demo folder, over an earlier demo's but over nothing else."""
    if out.exists() and not out.is_dir():
        raise FastAggError(f"{out} is a file; give the demo another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / RESULT).is_file():
        raise FastAggError(
            f"{out} exists and is not a demo's; give another folder with --out, or empty it"
        )
    for name in ("base", "clients", *METHODS):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / WEIGHTS).unlink(missing_ok=True)
    (out / RESULT).write_text("{}\n")
