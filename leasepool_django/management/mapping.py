"""What ``leasepool map`` reads, and where it writes: JSON, one value or outcome a line.

Lines are read as workers have time for them, so that neither the input nor the results have to fit
into memory. Outcomes are written in the order of the lines.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from .calls import Call, Outcome, json_value

__all__ = ["FileError", "Lines", "Results", "map_lines"]

_CHUNK = 1 << 16
_BOM = b"\xef\xbb\xbf"


class FileError(Exception):
    """A file, or a line of it, that cannot be used: a sentence for the user."""


class Lines:
    """The lines of a file of JSON values. ``name``: what to call it.

    ``behind``: how many lines to skip. Lines without anything but white space are passed over, and
    count.
    """

    def __init__(self, fd: int, name: str, *, behind: int = 0) -> None:
        self.name = name
        self.behind = behind
        self._fd = fd
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)

    def check(self) -> int | None:
        """Read all of a regular file once and return how many values are to come.

        ``FileError`` for the first line that is no JSON. ``None`` for a pipe or a terminal, whose
        lines come only once.
        """
        if not self._is_file:
            return None
        begin = os.lseek(self._fd, 0, os.SEEK_CUR)
        lines = _Splitter()
        values = 0
        while chunk := self._read():
            values += sum(
                self._value(number, line) is not _NOTHING for number, line in lines.feed(chunk)
            )
        values += sum(self._value(number, line) is not _NOTHING for number, line in lines.rest())
        os.lseek(self._fd, begin, os.SEEK_SET)
        return values

    async def values(self) -> AsyncIterator[tuple[int, Any]]:
        """Each line's number, from 1, and its value. ``FileError`` where there is none."""
        lines = _Splitter()
        ended = False
        while not ended:
            if not self._is_file:
                await self._wait_readable()
            chunk = self._read()
            ended = not chunk
            for number, line in lines.rest() if ended else lines.feed(chunk):
                value = self._value(number, line)
                if value is not _NOTHING:
                    yield number, value

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, _CHUNK)
        except OSError as error:
            raise FileError(f"{self.name} cannot be read: {error.strerror or error}.") from error

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_reader(self._fd, ready.set)
        except OSError:
            return  # such as /dev/null, which is always ready
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._fd)

    def _value(self, number: int, line: bytes) -> Any:
        if number <= self.behind or not line.strip():
            return _NOTHING
        origin = f"line {number} of {self.name}"
        try:
            return json_value(origin, line.decode())
        except UnicodeDecodeError as error:
            raise FileError(f"{origin[0].upper()}{origin[1:]} is not UTF-8: {error}.") from error
        except ValueError as error:
            text = str(error)
            raise FileError(f"{text[0].upper()}{text[1:]}") from error


_NOTHING: Any = object()


class _Splitter:
    """Makes numbered lines of pieces, whatever their lengths."""

    def __init__(self) -> None:
        self._number = 0
        self._pieces: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """The lines that ``chunk`` completes."""
        first, *others = chunk.split(b"\n")
        self._pieces.append(first)
        for piece in others:
            yield self._whole()
            self._pieces.append(piece)

    def rest(self) -> Iterator[tuple[int, bytes]]:
        """What is left at the end: a last line that nothing ends."""
        if any(self._pieces):
            yield self._whole()

    def _whole(self) -> tuple[int, bytes]:
        line = b"".join(self._pieces)
        self._pieces.clear()
        self._number += 1
        return self._number, line.removeprefix(_BOM) if self._number == 1 else line


async def map_lines(
    lines: Lines,
    run: Callable[[Call], Awaitable[Outcome]],
    add: Callable[[int, Call, Outcome], None],
    kwargs: dict[str, Any],
    *,
    at_once: int,
) -> None:
    """``run`` a call for each of ``lines``, and ``add`` the outcomes in their order.

    ``at_once``: how many lines may be under way, from being read to being written. ``FileError``
    once those before the line that is wrong have been written.
    """
    room = asyncio.Semaphore(at_once)
    begun: asyncio.Queue[tuple[int, Call, asyncio.Task[Outcome]] | None] = asyncio.Queue()
    trouble: FileError | None = None

    async def begin() -> None:
        nonlocal trouble
        try:
            async for number, value in lines.values():
                await room.acquire()
                call = Call((value,), kwargs)
                begun.put_nowait((number, call, tasks.create_task(_awaited(run(call)))))
        except FileError as error:
            trouble = error
        begun.put_nowait(None)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(begin())
        while (line := await begun.get()) is not None:
            number, call, outcome = line
            add(number, call, await outcome)
            room.release()
    if trouble is not None:
        raise trouble


async def _awaited(outcome: Awaitable[Outcome]) -> Outcome:
    return await outcome


class Results:
    """A file for results, which must not exist unless it is to be written anew, or gone on with.

    ``behind``: the number of the last line that it holds a result of, 0 if of none. ``ValueError``
    and ``OSError`` where that cannot be.
    """

    def __init__(self, path: Path, *, overwrite: bool, resume: bool) -> None:
        self.path = path
        self.behind = 0
        self._is_new = not path.exists()
        self._end = 0
        if self._is_new or overwrite:
            return
        if not resume:
            raise ValueError(
                f"{path} exists. --overwrite replaces it; --resume goes on behind its last line."
            )
        last = b""
        if not path.is_file():
            return
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # or it was interrupted there
                    last, self._end = line, self._end + len(line)
        self.behind = _number_of(last, path) if last else 0

    def open(self) -> FileIO:
        """Open it, and change nothing yet. ``FileError`` if it cannot be written."""
        try:
            if self._is_new:
                return self.path.open("xb", buffering=0)
            if self.path.is_file():
                return self.path.open("r+b", buffering=0)
            return self.path.open("wb", buffering=0)  # a device or a pipe
        except OSError as error:
            raise FileError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def begin(self, file: FileIO) -> None:
        """Cut ``file`` off where the new results go."""
        if self.path.is_file():
            file.truncate(self._end)
            file.seek(self._end)

    def forget(self) -> None:
        """Nothing was written: leave no file that was not there."""
        if self._is_new:
            self.path.unlink()


def _number_of(line: bytes, path: Path) -> int:
    try:
        number = json.loads(line)["line"]
    except (ValueError, TypeError, KeyError):
        number = None
    if type(number) is not int or number < 1:
        raise ValueError(f"{path} cannot be gone on with: its last line is no result of a line.")
    return number
