"""The Markdown pages as data: their code blocks, tables, headings and links.

A python block says in its info string where its code is a module that is checked and tested like
any other, below ``tests/recipes``:

- ``file=shop/uploads.py``: the block is that module, after its docstring and its first import;
- ``part-of=shop/settings.py``: the block is consecutive lines of that module;
- ``fragment``: the block has names that are the reader's, and is compiled only;
- nothing: the block is a module by itself, which the tests import.

``python -m tests.pages`` writes the modules of the first kind into the pages.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "RECIPES", "ROOT", "Block", "anchors", "blocks", "code_of", "links", "tables"]

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "tests" / "recipes"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
FUTURE = "from __future__ import annotations\n"


@dataclass(frozen=True)
class Block:
    """One code block. ``line``: of its first fence; ``info``: what follows the language."""

    page: Path
    line: int
    language: str
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def names(self, key: str) -> Path | None:
        """The module that the info string names after ``key=``."""
        prefix = f"{key}="
        found = [word.removeprefix(prefix) for word in self.info.split() if word.startswith(prefix)]
        return RECIPES / found[0] if found else None


def blocks(page: Path, *languages: str) -> list[Block]:
    """The code blocks of a page in these languages."""
    found = [_block(page, match) for match in FENCE.finditer(page.read_text())]
    return [block for block in found if block.language in languages]


def _block(page: Path, match: re.Match[str]) -> Block:
    line = match.string.count("\n", 0, match.start()) + 1
    text = textwrap.dedent(match["text"])
    return Block(page, line, match["language"], match["info"].strip(), text)


def code_of(module: Path) -> str:
    """What a page shows of a module: all that follows its docstring and its first import."""
    return module.read_text().partition(FUTURE)[2].strip("\n") + "\n"


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return FENCE.sub("", page.read_text())


def tables(page: Path) -> Iterator[list[dict[str, str]]]:
    """The tables of a page: for each, its rows as header → cell."""
    for match in re.finditer(r"^\|.*\|\n\|[-| :]+\|\n(?:\|.*\|\n)+", prose(page), re.MULTILINE):
        header, _, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
            for line in match[0].splitlines()
        ]
        yield [dict(zip(header, row, strict=True)) for row in rows]


def links(page: Path) -> list[str]:
    """The targets of a page's links."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def with_modules(page: Path) -> str:
    """The text of a page with its ``file=`` blocks as their modules are now."""

    def renewed(match: re.Match[str]) -> str:
        module = _block(page, match).names("file")
        if module is None:
            return match[0]
        start, end = (place - match.start() for place in match.span("text"))
        return match[0][:start] + textwrap.indent(code_of(module), match["indent"]) + match[0][end:]

    return FENCE.sub(renewed, page.read_text())


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_modules(path))
