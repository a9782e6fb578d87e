"""The rounds of an engine on disk: a folder for each that was finished, whole or not there.

    rounds/round-0003/clients.json     who is known, and which adapter is whose
    rounds/round-0003/adapter-0/       what PEFT loads; one for each kind of client
    rounds/round-0003/stack/           where clients merge (FLoRA): what they add to their base weights
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastagg.adapter import Adapter
from fastagg.engines.standing import Standing
from fastagg.errors import InvalidInput
from fastagg.peft_format.adapter_folder import new_folder
from fastagg.whole_file import write_whole

__all__ = ["SavedRounds"]

VERSION = 1
CLIENTS_NAME = "clients.json"


class SavedRounds:
    """A folder of finished rounds.

    Raises:
        InvalidInput: it has rounds, and ``resume`` is not set; or ``folder`` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], method: str, *, resume: bool) -> None:
        self.folder = Path(folder)
        self.method = method
        if self.folder.exists() and not self.folder.is_dir():
            raise InvalidInput(f"{self.folder} is not a folder", field="folder")
        if self._numbers() and not resume:
            raise InvalidInput(
                f"{self.folder} has rounds of an earlier run",
                field="folder",
                cure="Pass resume=True to go on from the last one, or choose another folder",
            )

    def last(self) -> Standing:
        """Where the last round left the clients; the beginning, where there is none.

        Raises:
            InvalidInput: it is damaged, or of another method.
        """
        numbers = self._numbers()
        if not numbers:
            return Standing()
        folder = self._path(numbers[-1])
        try:
            fields = json.loads((folder / CLIENTS_NAME).read_text(encoding="utf-8"))
            if fields["version"] != VERSION or fields["method"] != self.method:
                raise _unusable(
                    folder,
                    "it was saved otherwise",
                    f"version {VERSION}, method {self.method}",
                    f"version {fields['version']}, method {fields['method']}",
                )
            names: list[dict[str, str]] = fields["names"]
            adapters = [
                _renamed(Adapter.load(folder / f"adapter-{number}"), own)
                for number, own in enumerate(names)
            ]
            place = {str(client): int(number) for client, number in fields["clients"].items()}
            if any(not 0 <= number < len(adapters) for number in place.values()):
                raise _unusable(folder, "a client has no adapter")
            merged = range(1, numbers[-1] + 1) if fields["merging"] else ()
            stacks = [Adapter.load(self._path(number) / "stack") for number in merged]
            return Standing(
                numbers[-1],
                tuple(adapters),
                place,
                tuple(stacks),
                {str(client): int(through) for client, through in fields["merged_through"].items()},
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise _unusable(folder, f"{type(error).__name__}: {error}") from error

    def save(self, standing: Standing) -> Standing:
        """Writes a finished round; the standing that is returned maps its stack from the disk.

        Raises:
            OSError: it could not be written; nothing is left of it then.
        """
        target = self._path(standing.finished)
        merging = bool(standing.stacks)
        fields: dict[str, Any] = {
            "version": VERSION,
            "method": self.method,
            "merging": merging,
            "clients": dict(sorted(standing.place.items())),
            "merged_through": dict(sorted(standing.merged_through.items())),
            "names": [_own_names(adapter) for adapter in standing.adapters],
        }
        with new_folder(target, overwrite=False) as made:
            for number, adapter in enumerate(standing.adapters):
                adapter.save(made / f"adapter-{number}")
            if merging:
                standing.stacks[-1].save(made / "stack")
            write_whole(made / CLIENTS_NAME, json.dumps(fields, indent=2))
        if not merging:
            return standing
        # FLoRA's stacks of all rounds are kept for clients that come late: on disk, not in memory.
        return replace(standing, stacks=(*standing.stacks[:-1], Adapter.load(target / "stack")))

    def _numbers(self) -> list[int]:
        found = (re.fullmatch(r"round-(\d{4,})", path.name) for path in self.folder.glob("round-*"))
        return sorted(int(match[1]) for match in found if match)

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}"


def _own_names(adapter: Adapter) -> dict[str, str]:
    """The keys that are the client's own and not PEFT's."""
    spans = adapter.layout.tensors
    return {span.key: span.source for span in spans if span.source != span.key}


def _renamed(adapter: Adapter, names: dict[str, str]) -> Adapter:
    if not names:
        return adapter
    state = {names.get(key, key): tensor for key, tensor in adapter.state_dict().items()}
    return Adapter(state, adapter.config, name=adapter.name)


def _unusable(
    folder: Path, problem: str, expected: object = None, got: object = None
) -> InvalidInput:
    return InvalidInput(
        f"{folder} cannot be resumed: {problem}",
        field="folder",
        expected=expected,
        got=got,
        cure="Resume with the same method, or choose another folder",
    )
