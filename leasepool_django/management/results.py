"""The file that ``leasepool map`` writes to, an outcome a line, and can go on with."""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Results"]

_BEGINNING = b'{"line": '  # of each line, see report


class Results:
    """A file that must not exist, unless it is to be written anew or gone on with.

    ``behind``: the number of the last line that it holds a result of, 0 if of none. ``ValueError``
    and ``OSError`` where that cannot be. As a context manager it opens the file, in which nothing
    is changed before the first result; one that is new goes again if an error comes before that.
    """

    def __init__(self, path: Path, *, overwrite: bool, resume: bool) -> None:
        self.path = path
        self.behind = 0
        self.has_lines = False  # whether there is something to go on with
        self._file: FileIO | None = None
        # Also where a link leads to nothing.
        self._is_new = not os.path.lexists(path)
        self._is_regular = self._is_new or path.is_file()
        self._is_cut = not self._is_regular
        self._end = 0
        if path.is_dir():
            raise ValueError(f"{path} is a directory; the results need a file.")
        if self._is_new or overwrite:
            return
        if not resume:
            raise ValueError(
                f"{path} exists. --overwrite replaces it; --resume goes on behind its last line."
            )
        if self._is_regular:
            self._find_end()

    def _find_end(self) -> None:
        last = rest = b""
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    last, self._end = line, self._end + len(line)
                else:
                    rest = line  # of one that was interrupted there
        if last:
            self.behind = _number_of(last)
        if (last and not self.behind) or not _begins_like_one(rest):
            raise ValueError(
                f"{self.path} cannot be gone on with: its last line is no result of a line."
            )

    def __enter__(self) -> Self:
        if self._is_new:
            self._file = self.path.open("xb", buffering=0)
        else:
            self._file = self.path.open("r+b" if self._is_regular else "wb", buffering=0)
        return self

    def write(self, line: str) -> None:
        """Write ``line`` at once, behind all that stays."""
        assert self._file is not None
        self._cut()
        rest = memoryview(line.encode() + b"\n")
        while rest:
            rest = rest[self._file.write(rest) :]
        self.has_lines = self._is_regular

    def _cut(self) -> None:
        if not self._is_cut:
            assert self._file is not None
            self._file.truncate(self._end)
            self._file.seek(self._end)
            self._is_cut = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._file is not None
        with self._file as file:
            if kind is None:
                self._cut()
            elif self._is_new and not self.has_lines and self._is_still_there(file):
                self.path.unlink()

    def _is_still_there(self, file: FileIO) -> bool:
        """Whether nobody has put another file there, or anything into this one."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(file.fileno())) and not there.st_size


def _number_of(line: bytes) -> int:
    """The line whose result this is; 0 if it is none."""
    try:
        result = json.loads(line)
        number, ok = result["line"], result["ok"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
    return number if type(number) is int and number > 0 and type(ok) is bool else 0


def _begins_like_one(rest: bytes) -> bool:
    return _BEGINNING.startswith(rest[: len(_BEGINNING)])
