"""What ``leasepool map`` reads: JSON, one value a line.

Lines are read as workers have time for them, so that neither the input nor the results have to fit
into memory. Outcomes are written in the order of the lines.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from .calls import Call, Outcome, json_value

__all__ = ["FileError", "Lines", "map_lines"]

_CHUNK = 1 << 16
_BOM = b"\xef\xbb\xbf"


class FileError(ValueError):
    """A file, or a line of it, that cannot be used: a sentence for the user."""


class Lines:
    """The lines of a file of JSON values. ``name``: what to call it.

    ``behind``: how many lines have been done before. Lines of white space are passed over, and
    count. ``FileError`` for a line that holds anything but one JSON value that can be passed on,
    and if there are fewer lines than have been done.
    """

    def __init__(self, fd: int, name: str, *, behind: int = 0) -> None:
        self.name = name
        self.behind = behind
        self._fd = fd
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)

    def check(self) -> int | None:
        """Read all of a regular file once and return how many values are to come.

        ``None`` for a pipe or a terminal, whose lines come only once.
        """
        if not self._is_file:
            return None
        begin = os.lseek(self._fd, 0, os.SEEK_CUR)
        splitter = _Splitter()
        values = 0
        while not splitter.ended:
            values += sum(1 for _ in self._values_in(self._read(), splitter))
        os.lseek(self._fd, begin, os.SEEK_SET)
        return values

    async def values(self) -> AsyncIterator[tuple[int, Any]]:
        """The number of each line with a value, from 1, and the value."""
        splitter = _Splitter()
        while not splitter.ended:
            if self._is_file:
                await asyncio.sleep(0)  # the loop has other things to do as well
            else:
                await self._wait_readable()
            for number, value in self._values_in(self._read(), splitter):
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
        except OSError:  # such as /dev/zero, which is always ready
            await asyncio.sleep(0)
            return
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._fd)

    def _values_in(self, chunk: bytes, splitter: _Splitter) -> Iterator[tuple[int, Any]]:
        for number, line in splitter.feed(chunk):
            if number > self.behind and line.strip():
                yield number, self._value(number, line)
        if splitter.ended and splitter.number < self.behind:
            raise FileError(
                f"{self.name} has {splitter.number} lines, and {self.behind} have been done: "
                "--resume goes on with the same input."
            )

    def _value(self, number: int, line: bytes) -> Any:
        try:
            return json_value(f"line {number} of {self.name}", line.decode())
        except UnicodeDecodeError as error:
            raise FileError(f"Line {number} of {self.name} is not UTF-8: {error}.") from error
        except ValueError as error:
            text = str(error)
            raise FileError(f"{text[0].upper()}{text[1:]}") from error


class _Splitter:
    """Makes lines of pieces, whatever their lengths. ``number``: how many it has made."""

    def __init__(self) -> None:
        self.number = 0
        self.ended = False
        self._pieces: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """The lines that ``chunk`` completes; if it is empty, the last one, which nothing ends."""
        if not chunk:
            self.ended = True
            if any(self._pieces):
                yield self._whole()
            return
        first, *others = chunk.split(b"\n")
        self._pieces.append(first)
        for piece in others:
            yield self._whole()
            self._pieces.append(piece)

    def _whole(self) -> tuple[int, bytes]:
        line = b"".join(self._pieces)
        self._pieces.clear()
        self.number += 1
        return self.number, line.removeprefix(_BOM) if self.number == 1 else line


async def map_lines(
    lines: Lines,
    run: Callable[[Call], Coroutine[Any, Any, Outcome]],
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
                begun.put_nowait((number, call, tasks.create_task(run(call))))
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
