"""A job for NVFlare in one call: the controller, and the clients' script beside it."""

from __future__ import annotations

from typing import Any

from nvflare.client.config import ExchangeFormat, TransferType
from nvflare.fuel.utils.constants import FrameworkType
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner
from nvflare.recipe.spec import Recipe

from fastagg.engines.nvflare.controller import FastAggController

__all__ = ["FastAggRecipe"]


class FastAggRecipe(Recipe):  # type: ignore[misc]
    """A :class:`FastAggController` and a script for every client.

        recipe = FastAggRecipe(train_script="client.py", num_rounds=3, min_clients=4)
        recipe.execute(SimEnv(num_clients=4))

    Tensors pass as they are, bfloat16 and float16 too: both sides know how to send them.

    Args:
        name: of the job.
        train_script: what each client runs, with the Client API.
        train_args: its arguments.
        launch_external_process: whether it runs in a process of its own.
        command: what it is started with there.
        options: those of :class:`FastAggController`.
    """

    def __init__(
        self,
        *,
        name: str = "fastagg",
        train_script: str,
        train_args: str = "",
        launch_external_process: bool = False,
        command: str = "python3 -u",
        **options: Any,
    ) -> None:
        controller = FastAggController(**options)
        self.train_script = train_script
        self.train_args = train_args
        self.launch_external_process = launch_external_process
        self.command = command
        job = FedJob(name=name, min_clients=controller.min_clients)
        # It is installed on the server: a job that brought a copy along would be stuck with that.
        job.set_app_packages(["fastagg"])
        job.to_server(controller)
        super().__init__(job)

    def _prepare_client_apps(self) -> None:
        self._job.to_clients(
            ScriptRunner(
                script=self.train_script,
                script_args=self.train_args,
                launch_external_process=self.launch_external_process,
                command=self.command,
                framework=FrameworkType.PYTORCH,
                server_expected_format=ExchangeFormat.PYTORCH,
                params_transfer_type=TransferType.FULL,
            )
        )
