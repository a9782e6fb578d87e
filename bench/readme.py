"""What is written into README.md from records: a section between two marks, and its tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastagg.bench.record import Record, Row
from fastagg.whole_file import write_whole

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def rewrite(file: Path, begin: str, end: str, body: str, *, check: bool) -> None:
    """Puts a section between its marks, or only compares it; what is missing or differs ends the
    program."""
    text = file.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        sys.exit(f"{file.name} lacks the marks {begin} and {end}")
    written = f"{before}{begin}\n\n{body}\n\n{end}{after}"
    if not check:
        write_whole(file, written)
    elif written != text:
        sys.exit(f"{file.name} does not say what the records say: leave out --check to write it")


def source(record: Record, path: Path) -> str:
    """A line that names a record and where it was made."""
    machine, settings = record.machine, record.settings
    place = path.resolve().relative_to(ROOT)
    where = machine.gpu or f"{settings.threads} threads of an {machine.cpu} ({machine.capability})"
    return (
        f"- [`{place}`]({place}): {where}, torch {machine.torch}, {machine.date}, commit "
        f"{machine.commit}; {settings.effort} effort, factors {settings.dtype}, {settings.factors}."
    )


def rows_of(records: Sequence[Record], case: str, op: str) -> list[Row]:
    """The rows of a case and op, from the first record that has them."""
    return next((rows for rows in (record.of(case, op) for record in records) if rows), [])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines.insert(1, f"|{'---|' * len(head)}")
    return "\n".join(lines)
