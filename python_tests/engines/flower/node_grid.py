"""A grid of nodes in this process: real ClientApps, contexts and messages, which go through Flower's own
serialisation; only the network between is missing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from adapters import MODULES, make_config, make_state_dict
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fastagg.engines.flower import evaluate_reply, query_reply, receive, train_reply

RANKS = {"ann": 2, "ben": 4, "cyd": 8, "dan": 16}
EXAMPLES = {"ann": 10, "ben": 30, "cyd": 5, "dan": 100}
ALPHA = 16.0


def carried(message: Message) -> Message:
    """What the other side gets of a message: Flower takes it apart for the way, and puts it together."""
    arrived: Message = _carried(message)
    arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
    return arrived


def carried_record(record: ArrayRecord) -> ArrayRecord:
    """What the other side gets of a record."""
    return _carried(record)


def _carried(whole: Any) -> Any:
    parts = {name: part.deflate() for name, part in get_all_nested_objects(whole).items()}
    return inflate_object_from_contents(whole.object_id, parts)


@dataclass(eq=False)
class Trainer:
    """A client whose training is a draw of numbers, of the adapter that it got; it keeps what it got and
    sent, by round."""

    name: str
    rank: int
    dtype: torch.dtype = torch.float32
    says: str = "rank"
    got: dict[int, Any] = field(default_factory=dict)
    sent: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    evaluated: dict[int, Any] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)

    def app(self) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            self.kinds.append("train")
            received = receive(message, context)
            self.got[received.round] = received
            seed = 100 * received.round + self.rank
            state = make_state_dict(rank=self.rank, dtype=self.dtype, seed=seed)
            self.sent[received.round] = state
            config = make_config(rank=self.rank)
            return train_reply(message, state, config, EXAMPLES[self.name], {"loss": float(self.rank)})

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            self.kinds.append("evaluate")
            received = receive(message, context)
            self.evaluated[received.round] = received
            return evaluate_reply(message, EXAMPLES[self.name], {"accuracy": self.rank / 16})

        if self.says != "nothing":

            @app.query()
            def query(message: Message, context: Context) -> Message:
                self.kinds.append("query")
                rank = self.rank if self.says == "rank" else None
                config = make_config(rank=self.rank) if self.says == "config" else None
                return query_reply(message, context, client=self.name, rank=rank, config=config)

        return app


class NodeGrid(Grid):
    """Nodes by their ids; each has an app, and a context as long as the grid.

    Attributes:
        delay: node -> how often its reply is asked for in vain; None: always.
        altered: changes a node's reply on its way.
        alive: at every pull, how many of the replies handed out before are still held by someone.
    """

    def __init__(self, nodes: dict[int, Trainer], run_id: int = 1) -> None:
        self.nodes = nodes
        self.connected = dict(nodes)
        self.contexts = {
            node: Context(run_id, node, {}, RecordDict(), {}) for node in nodes
        }
        self.delay: dict[int, int | None] = {}
        self.altered: Callable[[int, Message], Message] = lambda node, reply: reply
        self.order: list[int] = []
        self.alive: list[int] = []
        self._pending: dict[str, Message] = {}
        self._asked: dict[str, int] = {}
        self._handed: list[weakref.ref[Any]] = []
        self._count = 0
        # What Flower sets in the process of a ServerApp.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1

    def set_run(self, run: Any) -> None:
        raise AssertionError("nobody sets the run")

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("deprecated")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.connected)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            self._count += 1
            name = f"message-{self._count}"
            message.metadata.__dict__["_message_id"] = name
            self._pending[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        self.alive.append(sum(content() is not None for content in self._handed))
        for name in message_ids:
            message = self._pending[name]
            node = message.metadata.dst_node_id
            self._asked[name] = self._asked.get(name, 0) + 1
            delay = self.delay.get(node, 0)
            if delay is None or self._asked[name] <= delay:
                continue
            del self._pending[name]
            self.order.append(node)
            reply = self.altered(node, self._answer(node, message))
            if reply.has_content():
                # Of the arrays: numbers that a metrics function gets are kept, they are small.
                self._handed += [
                    weakref.ref(array)
                    for record in reply.content.values()
                    if isinstance(record, ArrayRecord)
                    for array in record.values()
                ]
            found.append(reply)
        return found

    def _answer(self, node: int, message: Message) -> Message:
        arrived = carried(message)
        try:
            reply = self.nodes[node].app()(arrived, self.contexts[node])
        except Exception as error:
            reply = Message(Error(0, repr(error)), reply_to=arrived)
        return carried(reply)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def trainers(**options: Any) -> dict[str, Trainer]:
    return {name: Trainer(name, rank, **options) for name, rank in RANKS.items()}


def grid_of(clients: Iterable[Trainer], first: int = 11) -> NodeGrid:
    return NodeGrid({first + place: client for place, client in enumerate(clients)})


def delta(state: dict[str, torch.Tensor], module: str, rank: int) -> torch.Tensor:
    """s B A in float64, by the keys' ends alone."""
    (a,) = (t for key, t in state.items() if key.endswith(f"{module}.lora_A.weight"))
    (b,) = (t for key, t in state.items() if key.endswith(f"{module}.lora_B.weight"))
    assert a.shape[0] == b.shape[1] == rank
    return ALPHA / rank * b.double() @ a.double()


def exact(clients: Iterable[Trainer], round: int, module: str) -> torch.Tensor:
    """The dW of what the clients sent in a round."""
    took_part = [each for each in clients if round in each.sent]
    total = sum(EXAMPLES[each.name] for each in took_part)
    return sum(
        (EXAMPLES[each.name] / total * delta(each.sent[round], module, each.rank) for each in took_part),
        start=torch.zeros(MODULES[module], dtype=torch.float64),
    )


def assert_best(adapter: Any, dw: torch.Tensor, module: str, rank: int, room: float = 2e-6) -> None:
    """s B A of what arrived is as near to dW as a matrix of its rank can be (Eckart and Young).

    room: what rounding to the adapter's dtype may add, relative to |dW|.
    """
    best = torch.linalg.svdvals(dw)[rank:].norm()
    error = (delta(adapter.state_dict(), module, rank) - dw).norm()
    assert error <= best + room * dw.norm()


def merged(received: Any) -> dict[str, torch.Tensor]:
    """A client's base weights, of zeros, after it has merged what it was told to."""

    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (m, n) in MODULES.items():
                home: torch.nn.Module = self
                for part in name.split("."):
                    if not hasattr(home, part):
                        home.add_module(part, torch.nn.Module())
                    home = getattr(home, part)
                home.weight = torch.nn.Parameter(torch.zeros(m, n, dtype=torch.float64))

    base = received.merge_into(Base())
    return {name.removesuffix(".weight"): p.detach() for name, p in base.named_parameters()}
