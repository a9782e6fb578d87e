"""A job for NVFlare in one call: the controller, and the clients' script beside it."""

from __future__ import annotations

from typing import Any

from nvflare.client.config import ExchangeFormat, TransferType
from nvflare.fuel.utils.constants import FrameworkType
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner
from nvflare.recipe.spec import Recipe

from fastagg.engines.nvflare.controller import FastAggController
from fastagg.errors import InvalidInput

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

    ``nvflare.recipe.set_per_site_config`` may give sites a script, arguments and so on of their own.

    Raises:
        InvalidInput: as :class:`FastAggController`.
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
        # Under these names NVFlare looks for secrets that nobody should write into a job.
        self.train_args = train_args
        self.command = command
        self._client: dict[str, Any] = {
            "train_script": train_script,
            "train_args": train_args,
            "launch_external_process": launch_external_process,
            "command": command,
        }
        self._sites: dict[str, dict[str, Any]] = {}
        job = FedJob(name=name, min_clients=controller.min_clients)
        # It is installed on the server: a job that brought a copy along would be stuck with that.
        job.set_app_packages(["fastagg"])
        job.to_server(controller)
        super().__init__(job)

    def _apply_per_site_config(self, config: dict[str, dict[str, Any]]) -> None:
        for site, own in config.items():
            unknown = own.keys() - self._client.keys()
            if unknown:
                raise InvalidInput(
                    "not a setting of a site",
                    client=site,
                    field=min(unknown),
                    expected=", ".join(self._client),
                )
        self._sites = config

    def _prepare_client_apps(self) -> None:
        if not self._sites:
            self._job.to_clients(_runner(**self._client))
        for site, own in self._sites.items():
            self._job.to(_runner(**{**self._client, **own}), site)


def _runner(
    train_script: str, train_args: str, launch_external_process: bool, command: str
) -> ScriptRunner:
    return ScriptRunner(
        script=train_script,
        script_args=train_args,
        launch_external_process=launch_external_process,
        command=command,
        framework=FrameworkType.PYTORCH,
        server_expected_format=ExchangeFormat.PYTORCH,
        params_transfer_type=TransferType.FULL,
    )
