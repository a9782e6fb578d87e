"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folders = Annotated[
    list[Path],
    typer.Argument(
        metavar="FOLDER..",
        help="Adapter folders as PEFT's save_pretrained writes them.",
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout, for programs.", show_default=False),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace OUT where it exists.", show_default=False),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="The folder to write, completely or not at all.",
        show_default=False,
    ),
]
