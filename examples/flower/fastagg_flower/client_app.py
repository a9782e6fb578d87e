"""The client: trains the adapter that it got, at its own rank, on examples of its own."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import fastagg
from fastagg.engines.flower import Received, evaluate_reply, query_reply, receive, train_reply

app = ClientApp()


def number(context: Context) -> int:
    return int(context.node_config["partition-id"])


def rank(context: Context) -> int:
    ranks = str(context.run_config["ranks"]).split(",")
    return int(ranks[number(context) % len(ranks)])


def name(context: Context) -> str:
    """Node ids change from run to run; by this name the server knows the client again."""
    return f"client-{number(context)}"


def count(context: Context) -> int:
    """How many examples the client has."""
    return 8 * (number(context) + 1)


@app.query()
def query(message: Message, context: Context) -> Message:
    return query_reply(message, context, client=name(context), rank=rank(context))


@app.train()
def train(message: Message, context: Context) -> Message:
    # Imported here: a query is answered without waiting for transformers.
    from fastagg_flower import model as tiny

    received, run = receive(message, context), context.run_config
    model = tiny.with_adapter(received.merge_into(tiny.base_model()), received.adapter, rank(context))
    tokens = tiny.examples(number(context), count(context))
    loss = tiny.train(model, tokens, int(run["steps"]), float(run["learning-rate"]))
    tensors, config = tiny.trained(model, str(run["dtype"]))
    keep(received, context, "got", received.adapter)
    keep(received, context, "sent", fastagg.Adapter(tensors, config))
    return train_reply(message, tensors, config, count(context), {"train-loss": loss})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    from fastagg_flower import model as tiny

    received = receive(message, context)
    model = tiny.with_adapter(received.merge_into(tiny.base_model()), received.adapter, rank(context))
    loss = tiny.loss_of(model, tiny.examples(number(context), count(context)))
    keep(received, context, "evaluated", received.adapter)
    for made, stack in received.merges:
        keep(received, context, f"stack-{made}", stack)
    return evaluate_reply(message, count(context), {"loss": loss})


def keep(received: Received, context: Context, what: str, adapter: fastagg.Adapter | None) -> None:
    folder = str(context.run_config["keep"])
    if folder and adapter is not None:
        adapter.save(Path(folder, name(context), f"round-{received.round}", what), overwrite=True)
