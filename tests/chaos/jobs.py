"""Work for the workers under chaos. Each call leaves its number in one file before anything else.

A line appended with one ``write`` is whole, however the process dies: a number that is there twice
was run twice.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["ChaosError", "open_marks"]

EXIT_STATUS = 3
RECORDS = "tests.chaos.records"
PATIENCE = 30.0

_marks = -1


class ChaosError(Exception):
    """What a failing call raises. ``number``: of the call."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def open_marks(path: str) -> None:
    """The workers' initializer: where calls leave their marks."""
    global _marks  # noqa: PLW0603 - one per worker process
    _marks = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _mark(number: int) -> None:
    os.write(_marks, b"%d\n" % number)


def quick(number: int, value: int) -> int:
    _mark(number)
    return value + number


def slow(number: int, seconds: float) -> int:
    _mark(number)
    time.sleep(seconds)
    return number


def spin(number: int, seconds: float) -> int:
    """Keep a core busy."""
    _mark(number)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pass
    return number


def fail(number: int) -> NoReturn:
    _mark(number)
    raise ChaosError(number)


def fail_badly(number: int) -> NoReturn:
    """Raise what would end the caller's loop if it arrived as itself."""
    _mark(number)
    raise (SystemExit, KeyboardInterrupt, StopIteration)[number % 3](number)


def large(number: int, data: bytes | memoryview, size: int) -> tuple[int, memoryview | bytes]:
    """Return the checksum of ``data``, and ``size`` bytes that can be foretold."""
    _mark(number)
    pattern = number.to_bytes(8, "little") * (size // 8)
    return zlib.crc32(data), memoryview(pattern) if number % 2 else pattern


def log(number: int, records: int) -> int:
    _mark(number)
    logger = logging.getLogger(RECORDS)
    for index in range(records):
        logger.warning("%d", number, extra={"call_number": number, "record_index": index})
    return records


def unpicklable(number: int) -> Any:
    _mark(number)
    return [threading.Lock()]


def leave(number: int) -> NoReturn:
    """End the process."""
    _mark(number)
    os._exit(EXIT_STATUS)


def leave_a_child(number: int) -> int:
    """Start a process in a session of its own and return without looking after it."""
    _mark(number)
    child = subprocess.Popen(
        ["sleep", "600"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    child.returncode = 0  # its end is nobody's business
    return child.pid


def meet(folder: Path, name: str, count: int) -> int:
    """Return this process's number once ``count`` processes are here at the same time."""
    (folder / f"{name}-{os.getpid()}").touch()
    deadline = time.monotonic() + PATIENCE
    while len(list(folder.glob(f"{name}-*"))) < count:
        if time.monotonic() > deadline:
            sys.exit(f"fewer than {count} workers met")
        time.sleep(0.005)
    return os.getpid()
