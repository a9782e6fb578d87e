"""A controller for NVFlare that sends each client the adapter of its own rank."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from nvflare.apis.fl_constant import FLMetaKey, ReturnCode
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.tensor_disk_offload_context import (
    cleanup_tensor_disk_offload,
    setup_tensor_disk_offload,
)
from nvflare.app_common.workflows.model_controller import ModelController

from fastagg.aggregator import Aggregator
from fastagg.engines.exchange import Exchange, Outcome
from fastagg.engines.nvflare.models import ASK, config_in, model_of, tensors_in, weight_in
from fastagg.errors import FastAggError, InvalidInput
from fastagg.federated.messages import ClientFailure

__all__ = ["FastAggController"]


class FastAggController(ModelController):  # type: ignore[misc]
    """Rounds in which every client is sent its own adapter and answers with what it trained; each answer
    is folded in as it arrives, and nothing of it is kept.

        job.to_server(FastAggController(num_rounds=3, initial="/srv/first-adapter", ranks={"site-1": 4}))

    What a client is sent: its adapter's tensors in ``params`` and their configuration in
    ``meta["adapter_config"]``; nothing where it begins with an adapter of its own; where clients merge
    (``method="flora"``), the stacks that it has to add to its base weights, too. What it answers: its
    tensors in ``params``, what it counts for in ``meta``, and its ``meta["adapter_config"]``, which may
    be left out by a client that was sent one. :class:`AdapterClient` does it all.

    An answer that cannot be used, an error, and silence until the time-out are the client's failure: it
    is logged, and the round goes on. A round with too few answers is repeated.

    Args:
        num_rounds: how many there are in all, those that were resumed included.
        num_clients: how many take part in a round, drawn at random; None: all that there are.
        min_clients: with fewer usable answers a round does not count.
        attempts: how often a round is tried before the job ends with an error.
        timeout: seconds that the clients have for a round; 0: as long as they take.
        initial: the folder of an adapter, on the server, from which the first adapters of all ranks are
            cut. None: clients begin with their own.
        ranks: client -> rank; "ask": every client is asked for its configuration before its first round.
            Both need ``initial``. None: the rank of ``initial``, or of what the client answers with.
        folder: where every round is saved, on the server; None: ``rounds`` in the job's run folder.
        resume: go on from the last round that was saved in ``folder``, if there is one.
        weight_field: of ``FLModel.meta``: what a client counts for; 1 where it does not say.
        task_name: of the clients' task.
        enable_tensor_disk_offload: NVFlare receives tensors into files, which are read one client at a
            time.
        method, max_memory, missing, accumulator, route, device, dtype, seed: as
            :class:`fastagg.Aggregator` takes them, as text and numbers.

    Raises:
        InvalidInput: an option that does not exist.
    """

    def __init__(
        self,
        num_rounds: int,
        *,
        num_clients: int | None = None,
        min_clients: int = 1,
        attempts: int = 3,
        timeout: int = 0,
        initial: str | None = None,
        ranks: Mapping[str, int] | str | None = None,
        folder: str | None = None,
        resume: bool = False,
        weight_field: str = FLMetaKey.NUM_STEPS_CURRENT_ROUND,
        task_name: str = AppConstants.TASK_TRAIN,
        enable_tensor_disk_offload: bool = False,
        method: str = "flexlora",
        max_memory: int | str | None = None,
        missing: str = "renormalise",
        accumulator: str = "auto",
        route: str = "auto",
        device: str = "auto",
        dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        # A client's error is for the round to judge, not for NVFlare, which would end the job.
        super().__init__(persistor_id="", ignore_result_error=True)
        # A job's configuration is written from attributes that are called as the arguments are.
        self.num_rounds = num_rounds
        self.num_clients = num_clients
        self.min_clients = min_clients
        self.attempts = attempts
        self.timeout = timeout
        self.initial = os.fspath(initial) if initial is not None else None
        self.ranks = dict(ranks) if isinstance(ranks, Mapping) else ranks
        self.folder = os.fspath(folder) if folder is not None else None
        self.resume = resume
        self.weight_field = weight_field
        self.task_name = task_name
        self.enable_tensor_disk_offload = enable_tensor_disk_offload
        self.method = method
        self.max_memory = max_memory
        self.missing = missing
        self.accumulator = accumulator
        self.route = route
        self.device = device
        self.dtype = dtype
        self.seed = seed
        self._check_options()
        # Answers come in NVFlare's threads, and one may be worked on while the round's time runs out.
        self._lock = threading.Lock()
        self._met: set[str] = set()
        self._told: set[str] = set()
        self._turn = 0
        self._open = False

    def run(self) -> None:
        """Plays the rounds; NVFlare calls it.

        Raises:
            FastAggError: a round came to nothing at every attempt.
        """
        self._folder = self.folder or os.path.join(self.get_run_dir(), "rounds")
        self._exchange = Exchange(
            self.method,
            initial=self.initial,
            ranks=self.ranks if isinstance(self.ranks, dict) else None,
            min_clients=self.min_clients,
            folder=self._folder,
            resume=self.resume,
            device=self.device,
            **self._options(),
        )
        offload = setup_tensor_disk_offload(
            self.engine, self.enable_tensor_disk_offload, self.fl_ctx.get_job_id("job")
        )
        try:
            self._play_rounds()
        finally:
            cleanup_tensor_disk_offload(self.engine, offload)

    def _play_rounds(self) -> None:
        attempt = 1
        while self._exchange.round <= self.num_rounds:
            outcome = self._play_round()
            if outcome is None:
                self.info("The job was ended from outside")
                return
            if outcome.aggregate is None and attempt == self.attempts:
                raise FastAggError(
                    f"round {outcome.round} came to nothing {attempt} times: {outcome.problem}. "
                    + "; ".join(failure.reason for failure in outcome.failures)
                )
            attempt = attempt + 1 if outcome.aggregate is None else 1

    def _play_round(self) -> Outcome | None:
        """A round; None where the job was ended meanwhile."""
        clients = self.sample_clients(self.num_clients)
        if self.ranks == "ask" and not self._ask(set(clients) - self._told):
            return None
        for client in set(clients) - self._met:
            # A client that this controller has not met begins with the base weights of round 1.
            self._exchange.merged_through(client, 0)
        outgoing = {client: self._exchange.outgoing(client) for client in clients}
        number = self._exchange.begin(clients)
        self._met.update(clients)
        self._turn, self._open = self._turn + 1, True
        self.fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number - 1, private=True, sticky=False)
        self.event(AppEventType.ROUND_STARTED)
        for client, out in outgoing.items():
            model = model_of(out.adapter, out.merges)
            model.current_round, model.total_rounds = number - 1, self.num_rounds
            self._send(client, model, functools.partial(self._receive, self._turn))
        if not self._wait():
            return None
        with self._lock:
            self._open = False
            outcome = self._exchange.finish()
        self.event(AppEventType.ROUND_DONE)
        self._say(outcome)
        return outcome

    def _ask(self, clients: Iterable[str]) -> bool:
        """Has the clients say what their adapters look like; False where the job was ended meanwhile."""
        for client in sorted(clients):
            self._send(client, FLModel(params={}, meta={ASK: True}), self._enrol)
        return self._wait()

    def _enrol(self, model: FLModel) -> bool:
        client = model.meta["client_name"]
        with self._lock:
            # In a round that has begun meanwhile, it has been handed an adapter already.
            if self._open:
                return False
            try:
                self._exchange.enrol(client, config_in(model))
            except InvalidInput as error:
                self.error(str(error))
                return False
            self._told.add(client)
            return True

    def _receive(self, turn: int, model: FLModel) -> bool:
        """Takes one client's answer in; whether it counts."""
        client = model.meta["client_name"]
        with self._lock:
            if turn != self._turn or not self._open:
                self.warning(f"client {client!r} answered when its time was up: it is left out")
                return False
            failure = self._take(client, model)
        if failure is not None:
            self.error(str(failure))
        return failure is None

    def _take(self, client: str, model: FLModel) -> ClientFailure | None:
        try:
            tensors = tensors_in(model, client)
            weight = weight_in(model, self.weight_field, client)
        except InvalidInput as error:
            return self._exchange.fail(client, str(error))
        if weight is None:
            self.warning(f"client {client!r} counts for 1: its meta has no {self.weight_field}")
            weight = 1
        return self._exchange.receive(client, tensors, weight, config_in(model))

    def _accept_train_result(self, client_name: str, result: Any, **kwargs: Any) -> bool:
        accepted: bool = super()._accept_train_result(client_name=client_name, result=result, **kwargs)
        code = result.get_return_code(ReturnCode.OK)
        if not accepted and code != ReturnCode.OK and not kwargs.get("is_unknown_task"):
            with self._lock:
                if self._open:
                    self._exchange.fail(client_name, f"its task ended with {code}")
        return accepted

    def _send(self, client: str, model: FLModel, callback: Any) -> None:
        self.send_model(
            task_name=self.task_name,
            data=model,
            targets=[client],
            timeout=self.timeout,
            callback=callback,
        )

    def _wait(self) -> bool:
        """Until every task has its answer or its time is up; False where the job was ended."""
        while self.get_num_standing_tasks():
            if self.abort_signal.triggered:
                return False
            time.sleep(self._task_check_period)
        return not self.abort_signal.triggered

    def _say(self, outcome: Outcome) -> None:
        what = "came to nothing" if outcome.aggregate is None else f"saved in {self._folder}"
        self.info(
            f"Round {outcome.round} {what}: {len(outcome.participants)} clients by {self.method}, "
            f"{outcome.seconds:.2f} s of the server's own work"
        )
        for failure in outcome.failures:
            self.warning(f"Left out: {failure}")
        if outcome.problem is not None:
            self.error(outcome.problem)

    def _options(self) -> dict[str, Any]:
        names = ("max_memory", "missing", "accumulator", "route", "dtype", "seed")
        return {name: getattr(self, name) for name in names}

    def _check_options(self) -> None:
        # The machine that builds the job need not have the server's GPU.
        Aggregator(self.method, device="cpu", **self._options())
        if isinstance(self.ranks, str) and self.ranks != "ask":
            raise InvalidInput(
                "not the clients' ranks",
                field="ranks",
                expected="a mapping from client to rank, or 'ask'",
                got=repr(self.ranks),
            )
        if self.ranks and self.initial is None:
            raise InvalidInput(
                "ranks before the first round need an adapter to cut theirs from",
                field="initial",
                expected="the folder of an adapter",
                got="None",
                cure="Leave ranks out: each client's first answer says its own",
            )
        for field in ("num_rounds", "min_clients", "attempts"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidInput(
                    "not a number", field=field, expected="an integer >= 1", got=repr(value)
                )
