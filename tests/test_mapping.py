"""How lines are read for ``leasepool map``, and how many are under way at once."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from leasepool_django.management.calls import Call, Outcome
from leasepool_django.management.mapping import FileError, Lines, map_lines


def lines_of(path: Path, data: bytes) -> list[tuple[int, Any]]:
    path.write_bytes(data)

    async def main() -> list[tuple[int, Any]]:
        with path.open("rb") as file:
            lines = Lines(file.fileno(), path.name)
            assert lines.check() == len([line for line in data.split(b"\n") if line.strip()])
            return [line async for line in lines.values()]

    return asyncio.run(main())


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 400_000])
def test_lines_of_any_length_are_whole(size: int, tmp_path: Path) -> None:
    values = ["a" * size, "b", "c" * size]
    data = b"\n".join(json.dumps(value).encode() for value in values)
    assert lines_of(tmp_path / "in", data) == list(enumerate(values, start=1))
    assert lines_of(tmp_path / "in", data + b"\n") == list(enumerate(values, start=1))


def test_lines_are_read_as_there_is_room_for_them() -> None:
    under_way = most = 0
    added: list[int] = []

    async def run(call: Call) -> Outcome:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        (number,) = call.args
        if number % 7 == 0:  # all that come after it have to wait for it
            await asyncio.sleep(0.005)
        return Outcome("f", None, None, number)

    def add(line: int, call: Call, outcome: Outcome) -> None:
        nonlocal under_way
        under_way -= 1
        added.append(outcome.result)

    async def main() -> None:
        ours, theirs = os.pipe()
        os.write(theirs, b"".join(b"%d\n" % number for number in range(500)))
        os.close(theirs)
        try:
            await map_lines(Lines(ours, "pipe"), run, add, {}, at_once=5)
        finally:
            os.close(ours)

    asyncio.run(main())
    assert added == list(range(500))
    assert 1 < most <= 5


def test_a_pipe_that_breaks_is_told(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileError, match=r"^folder cannot be read: Is a directory\.$"):
            asyncio.run(map_lines(Lines(fd, "folder"), run_never, add_never, {}, at_once=1))
    finally:
        os.close(fd)


async def run_never(call: Call) -> Outcome:
    raise AssertionError(call)


def add_never(line: int, call: Call, outcome: Outcome) -> None:
    raise AssertionError(line, call, outcome)
