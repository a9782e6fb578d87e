"""The configuration of a run: TOML under dotted options, checked, and written back as TOML."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w
from pydantic import Field, ValidationError

from fastagg.errors import InvalidInput, short
from fastagg.federated.simulation.settings import (
    DataSection,
    EvaluationSection,
    FederationSection,
    LoraSection,
    ModelSection,
    OutputSection,
    RanksSection,
    Section,
    TrainingSection,
    did_you_mean,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class RunConfig(Section):
    """All settings of a run."""

    seed: Annotated[int, Field(ge=0)] = Field(0, description="What every random draw derives from.")
    model: ModelSection = Field(ModelSection(), description="What is fine-tuned.")
    data: DataSection = Field(DataSection(), description="What clients train on.")
    ranks: RanksSection = Field(RanksSection(), description="Who gets which rank.")
    lora: LoraSection = Field(LoraSection(), description="The clients' adapters.")
    training: TrainingSection = Field(TrainingSection(), description="What a client does in a round.")
    federation: FederationSection = Field(
        FederationSection(), description="Rounds, who takes part, and the server."
    )
    evaluation: EvaluationSection = Field(EvaluationSection(), description="What is measured.")
    output: OutputSection = Field(OutputSection(), description="What a run leaves.")

    @classmethod
    def read(cls, path: Path, options: Mapping[str, str] | None = None) -> RunConfig:
        """A TOML file, under the options of the command line.

        Raises:
            InvalidInput: not readable, not TOML, or see :meth:`of`.
        """
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidInput(f"cannot read the configuration {path}: {error}") from None
        return cls.of(settings, options)

    @classmethod
    def of(cls, settings: Mapping[str, Any], options: Mapping[str, str] | None = None) -> RunConfig:
        """Checked settings.

        Args:
            settings: nested as in TOML.
            options: dotted name -> text, such as ``{"lora.targets": "q_proj,v_proj"}``; they win.

        Raises:
            InvalidInput: a name that there is not (with the nearest that there is), or a value that is
                none of this setting.
        """
        merged = _copied(settings)
        for name, text in (options or {}).items():
            _set(merged, name, text)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise _refusal(error) from None

    def to_toml(self) -> str:
        """All settings, defaults included; :meth:`read` gives back an equal configuration."""
        return tomli_w.dumps(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Setting:
    """One setting as an option: its dotted name, and what a user reads of it.

    default: as an option has it; empty where the setting is.
    choices: its values, or a list's items, where there are but a few.
    section: the dotted name of its section; empty at the top, as is that one's description.
    """

    name: str
    default: str
    kind: str
    choices: tuple[str, ...]
    description: str
    section: str
    section_description: str


def all_settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the sections."""
    return tuple(_settings(RunConfig()))


def _settings(section: Section, name: str = "", description: str = "") -> Iterator[Setting]:
    for last, field in type(section).model_fields.items():
        own = f"{name}.{last}" if name else last
        value, purpose = getattr(section, last), field.description or ""
        if isinstance(value, Section):
            yield from _settings(value, own, purpose)
        else:
            kind, choices = _kind(field.annotation), tuple(_choices(field.annotation))
            yield Setting(own, _text(value), kind, choices, purpose, name, description)


def _text(value: object) -> str:
    """A value as an option has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        tables = any(isinstance(item, Section) for item in value)
        return f"[{', '.join(map(_table, value))}]" if tables else ",".join(map(str, value))
    return str(value)


def _table(section: Section) -> str:
    """TOML's inline table."""
    lines = tomli_w.dumps(section.model_dump(mode="json")).splitlines()
    return f"{{{', '.join(lines)}}}"


def _kind(annotation: Any) -> str:
    """What a value looks like."""
    of_origin = {tuple: "LIST", Literal: "CHOICE"}
    of_type = {bool: "true|false", int: "INTEGER", float: "NUMBER"}
    return of_origin.get(get_origin(annotation)) or of_type.get(annotation, "TEXT")


def _choices(annotation: Any) -> Iterator[str]:
    """Of a Literal, and of those in it."""
    if isinstance(annotation, str):
        yield annotation
    for inner in get_args(annotation):
        yield from _choices(inner)


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _copied(value) if isinstance(value, Mapping) else value for name, value in settings.items()
    }


def _set(settings: dict[str, Any], name: str, text: str) -> None:
    *sections, last = name.split(".")
    for section in sections:
        inner = settings.setdefault(section, {})
        if not isinstance(inner, dict):
            raise _unknown(name)
        settings = inner
    settings[last] = text


def _refusal(error: ValidationError) -> InvalidInput:
    """The first thing wrong, as this package says it; unknown names first, for they explain others."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda each: each["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(name)
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, InvalidInput):
        return raised
    problem = str(raised) if raised is not None else first["msg"]
    return InvalidInput(problem, field=name, got=short(first["input"]))


def _unknown(name: str) -> InvalidInput:
    return InvalidInput("no such setting", field=name, cure=did_you_mean(_nearest(name)))


def _nearest(name: str) -> list[str]:
    """The setting or section whose dotted name, or last part of it, is most like this one's."""
    known = [setting.name for setting in all_settings()]
    sections = {name.rpartition(".")[0] for name in known if "." in name}

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return max(whole, 0.95 * last)

    best = max([*known, *sorted(sections)], key=likeness)
    return [best] if likeness(best) >= 0.6 else []
