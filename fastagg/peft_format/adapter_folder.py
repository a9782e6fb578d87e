"""The two files of a PEFT adapter's folder: found, read with care, and written all or nothing."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastagg.errors import InvalidInput
from fastagg.peft_format.config import CONFIG_NAME

__all__ = ["WEIGHTS_NAME", "find_weights", "named_path", "new_folder", "read_config", "write_synced"]

WEIGHTS_NAME = "adapter_model.safetensors"

_AGAIN = "Copy the file again from the client, or have it save the adapter again"
_SAVE_PRETRAINED = "Pass the folder that save_pretrained wrote"


def named_path(folder: str | os.PathLike[str]) -> Path:
    """The absolute path under which a folder was given: its name is the adapter's.

    A link keeps its own name; only a path with `..` is resolved.
    """
    path = Path(folder)
    return path.resolve() if ".." in path.parts else path.absolute()


def read_config(folder: Path, client: str | None) -> dict[str, Any]:
    """The content of ``adapter_config.json``, not yet judged.

    Raises:
        InvalidInput: no folder, no such file, or not JSON.
    """
    if not folder.is_dir():
        raise InvalidInput(
            f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}",
            client=client,
            expected=f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME}",
            cure=_SAVE_PRETRAINED,
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        # PEFT saves an adapter that is not called "default" into a subfolder of its name.
        nested = sorted(item.parent.name for item in folder.glob(f"*/{CONFIG_NAME}"))
        raise InvalidInput(
            f"{folder} has no {CONFIG_NAME}",
            client=client,
            field=CONFIG_NAME,
            cure=f"Pass its subfolder {nested[0]!r}, which has one" if nested else _SAVE_PRETRAINED,
        )
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror or error}", client=client, field=CONFIG_NAME
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{path} is not JSON: {error}", client=client, field=CONFIG_NAME, cure=_AGAIN
        ) from error
    return fields


def find_weights(folder: Path, client: str | None) -> Path:
    """The path of ``adapter_model.safetensors``.

    Raises:
        InvalidInput: there is none; a pickle in its place is not touched.
    """
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return path
    pickles = sorted(item for kind in ("bin", "pt", "pth") for item in folder.glob(f"*.{kind}"))
    if pickles:
        raise InvalidInput(
            f"{folder} holds a pickle, which may run code when it is read",
            client=client,
            field=pickles[0].name,
            expected=WEIGHTS_NAME,
            cure="Have the client save with safe_serialization=True (PEFT's default), or convert a "
            "file that you trust: safetensors.torch.save_file(torch.load(path, "
            f"weights_only=True), '{WEIGHTS_NAME}')",
        )
    raise InvalidInput(
        f"{folder} has no {WEIGHTS_NAME}", client=client, field=WEIGHTS_NAME, cure=_SAVE_PRETRAINED
    )


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a new file and brings it to the disk."""
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(target: Path, *, overwrite: bool, client: str | None = None) -> Iterator[Path]:
    """A folder beside the target to write into, renamed into place when the block succeeds.

    What was at the target is removed only after that; nothing is left of a block that fails.

    Raises:
        InvalidInput: the target exists and may not be overwritten, or is no folder.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not (overwrite and target.is_dir()):
        raise InvalidInput(
            f"{target} exists" + ("" if target.is_dir() else " and is not a folder"),
            client=client,
            cure="Choose another path"
            + (", or pass overwrite=True to replace it" if target.is_dir() else ""),
        )
    parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    made.mkdir()
    try:
        yield made
        for folder, _, _ in os.walk(made):
            _sync_folder(Path(folder))
        _replace(made, target)
        for parent in parents:
            _sync_folder(parent.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        for parent in parents:
            with suppress(OSError):  # someone else put something there
                parent.rmdir()
        raise


def _replace(made: Path, target: Path) -> None:
    if not target.exists():
        made.rename(target)
    else:
        old = made.with_name(made.name + ".old")
        try:
            target.rename(old)
            made.rename(target)
        finally:  # Ctrl-C may come between the two
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
