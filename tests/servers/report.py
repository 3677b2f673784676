"""Writes what the tests of servers saw into ``docs/deployment.md``: ``make server-table``.

Run with ``python -m tests.servers.report`` after the tests, the slow ones included.
"""

from __future__ import annotations

import sys

from .kinds import KINDS
from .recording import FILE, ROOT, Rows, environment, read

__all__ = ["PAGE", "between_marks", "render"]

PAGE = ROOT / "docs" / "deployment.md"
BEGIN, END = "<!-- server table: begin -->\n", "<!-- server table: end -->\n"

# Header of a column, and the cells that make it.
COLUMNS = {
    "pools start": ["start"],
    "a pool cannot start": ["failed start"],
    "the client leaves": ["client leaves"],
    "SIGTERM": ["SIGTERM"],
    "exit status": ["exit status"],
    "SIGTERM to every process": ["every process"],
    "Ctrl-C": ["Ctrl-C"],
}
# The same everywhere, and said in a sentence.
EVERYWHERE = {"calls": "async and sync", "SIGKILL": "gone within 1 s"}


def render(rows: Rows) -> str:
    """The table, in Markdown. ``ValueError`` names what was not seen, or is not as said."""
    wanted = {*EVERYWHERE, *(cell for cells in COLUMNS.values() for cell in cells)}
    missing = [
        f"{kind.name}: {cell}" for kind in KINDS for cell in wanted - set(rows.get(kind.name, {}))
    ]
    if missing:
        raise ValueError("not seen by the tests: " + ", ".join(sorted(missing)))
    for kind in KINDS:
        for cell, value in EVERYWHERE.items():
            if rows[kind.name][cell] != value:
                raise ValueError(f"{kind.name}: {cell} is {rows[kind.name][cell]!r}, not {value!r}")
    lines = [_line("server", *COLUMNS), _line(*["---"] * (len(COLUMNS) + 1))]
    for kind in KINDS:
        cells = rows[kind.name]
        shown = ["; ".join(cells[name] for name in names) for names in COLUMNS.values()]
        lines.append(_line(f"`{kind.name}`", *shown))
    versions = ", ".join(f"{name} {version}" for name, version in environment().items())
    sentence = (
        "Under each of them single calls and leases work from async and from sync views, and one "
        "second after\n`SIGKILL` of a server process none of its workers is left. Seen with "
        f"{versions}."
    )
    return "\n".join([*lines, "", sentence, ""])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def between_marks(page: str, text: str) -> str:
    """``page`` with ``text`` between the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"no {BEGIN.strip()}"
    assert end, f"no {END.strip()}"
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> int:
    """Write the table; the exit status."""
    try:
        table = render(read())
    except ValueError as error:
        sys.stderr.write(f"{FILE}: {error}\nRun: make server-table\n")
        return 1
    PAGE.write_text(between_marks(PAGE.read_text(), table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
