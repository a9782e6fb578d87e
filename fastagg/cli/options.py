"""Options that several commands share, and what they have in common."""

from __future__ import annotations

import re
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
OutOrState = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="The folder to write, completely or not at all.",
        show_default=False,
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="FILE",
        help="Instead of OUT: save the round in this file, for `fastagg combine` at the next level of a "
        "tree of servers.",
        show_default=False,
    ),
]
Condense = Annotated[
    int | None,
    typer.Option(
        "--condense",
        min=1,
        metavar="RANK",
        help="With --state: keep the best approximation of this rank of the clients' weighted sum "
        "instead of their adapters. Twice the largest client's rank is the least to take.",
        show_default=False,
    ),
]


def check_one(out: Path | None, state: Path | None, condense: int | None, ranks: str | None) -> None:
    """Whether either OUT or a state is to be written, and the other options are of that one."""
    if (out is None) == (state is None):
        raise typer.BadParameter("give either --out or --state")
    if condense is not None and state is None:
        raise typer.BadParameter("--condense is for --state: what is handed out is truncated anyway")
    if ranks is not None and state is not None:
        raise typer.BadParameter("--ranks is for --out: a state holds every client's own")


def check_ranks(text: str | None) -> str | None:
    """Refuses ranks that are none."""
    if text is not None:
        parsed_ranks(text)
    return text


def parsed_ranks(text: str) -> list[int]:
    """ "8,4" as [4, 8]."""
    from fastagg.errors import short

    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise typer.BadParameter(f"expected ranks above 0 such as 4,8,16, got {short(text)}")
    return sorted({int(part) for part in parts})
