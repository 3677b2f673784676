"""The table of servers in the documentation: complete, and written as the tests saw it."""

from __future__ import annotations

import pytest

from tests.pages import tables
from tests.servers.kinds import KINDS
from tests.servers.report import COLUMNS, EVERYWHERE, PAGE, between_marks, render

CELLS = {cell: cell.upper() for cells in COLUMNS.values() for cell in cells} | EVERYWHERE
ROWS = {kind.name: CELLS for kind in KINDS}


def test_every_server_has_its_row_on_the_page() -> None:
    [table] = [rows for rows in tables(PAGE) if next(iter(rows[0])) == "server" and len(rows) > 5]
    assert [row["server"] for row in table] == [f"`{kind.name}`" for kind in KINDS]
    assert list(table[0]) == ["server", *COLUMNS]
    for row, kind in zip(table, KINDS, strict=True):
        assert row["pools start"] == ("with the server" if kind.lifespan else "first use")
        assert row["the client leaves"] == ("killed" if kind.cancels else "runs on")


def test_the_table_is_made_of_what_was_seen() -> None:
    text = render(ROWS)
    assert text.count("\n| `") == len(KINDS)
    assert "| `uvicorn` | START | FAILED START | CLIENT LEAVES | SIGTERM |" in text
    assert "Django " in text


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_said_that_was_not_seen(cell: str) -> None:
    seen = {**CELLS}
    del seen[cell]
    with pytest.raises(ValueError, match=f"not seen by the tests: uvicorn: {cell}"):
        render({**ROWS, "uvicorn": seen})


def test_what_is_said_of_all_holds_for_all() -> None:
    with pytest.raises(ValueError, match="daphne: calls is 'async'"):
        render({**ROWS, "daphne": {**CELLS, "calls": "async"}})


def test_the_rest_of_the_page_stays() -> None:
    page = "before\n<!-- server table: begin -->\nold\n<!-- server table: end -->\nafter\n"
    renewed = between_marks(page, "new\n")
    assert renewed == page.replace("old\n", "\nnew\n\n")
    assert between_marks(renewed, "new\n") == renewed
