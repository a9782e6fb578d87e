"""Every setting of a run as an option of its dotted name, and the usual ones by a short name too.

The options are made when the command is asked for them: the settings' module is not imported for any
other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from fastagg.cli.failures import fail
from fastagg.errors import InvalidInput

if TYPE_CHECKING:
    from fastagg.federated.simulation.config import Setting

SHORT_NAMES = {
    "federation.methods": ("--methods",),
    "federation.rounds": ("--rounds",),
    "federation.workers": ("--workers",),
    "data.clients": ("--clients",),
    "model.name": ("--model",),
    "training.learning_rate": ("--learning-rate",),
    "model.device": ("--device",),
    "seed": ("--seed",),
    "output.folder": ("--out", "-o"),
}
_GIVEN = "fastagg.settings"


class SettingsCommand(TyperCommand):
    """A command that takes every setting; :func:`given_settings` has those that were given."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [*_options(), *super().get_params(ctx)]


# `--training.learning-rate` is `--training.learning_rate`.
CONTEXT = {"token_normalize_func": lambda name: name.replace("-", "_")}


def given_settings(context: typer.Context) -> dict[str, str]:
    """Dotted name -> the text that was given for it."""
    found: dict[str, str] = context.meta.setdefault(_GIVEN, {})
    return found


@functools.cache
def _options() -> tuple[Any, ...]:
    """As typer makes them of a function that has them all as parameters."""
    try:
        from fastagg.federated.simulation.config import all_settings
    except ImportError as error:
        fail(
            InvalidInput(f"simulating needs {error.name}", cure="pip install 'fastagg[federated]'"),
            as_json=False,
        )
    settings = {setting.name: setting for setting in all_settings()}
    parameters = [
        *(_parameter(settings[name], None, *names) for name, names in SHORT_NAMES.items()),
        *(_parameter(s, _panel(s), f"--{s.name}") for s in settings.values() if s.section),
    ]

    def command() -> None: ...

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return tuple(typer.main.get_command(app).params)


def _panel(setting: Setting) -> str:
    return f"{setting.section}: {setting.section_description.rstrip('.')}"


def _parameter(setting: Setting, panel: str | None, *names: str) -> inspect.Parameter:
    what = "Some" if setting.kind == "LIST" else "One"
    choices = f" {what} of {', '.join(setting.choices)}." if setting.choices else ""
    option = typer.Option(
        *names,
        metavar=setting.kind,
        help=setting.description + choices,
        rich_help_panel=panel,
        expose_value=False,
        callback=_collected(setting.name),
    )
    return inspect.Parameter(
        names[0].strip("-").replace(".", "__").replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[str, option],
        default=setting.default,
    )


def _collected(name: str) -> Callable[[typer.Context, typer.CallbackParam, str], None]:
    def collect(context: typer.Context, parameter: typer.CallbackParam, text: str) -> None:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            return
        given = given_settings(context)
        if given.setdefault(name, text) != text:
            raise typer.BadParameter(f"{text!r}, where {name} is given as {given[name]!r} already")

    return collect
