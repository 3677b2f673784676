"""Functions that the project's views run in workers."""

from __future__ import annotations

import os
import time
from pathlib import Path


def begin(broken: str) -> None:
    """The pool's initializer; a reason given makes it fail."""
    if broken:
        raise RuntimeError(broken)


def double(number: int) -> tuple[int, int]:
    """Twice the number, and the process that computed it."""
    return number * 2, os.getpid()


def sleep(seconds: float, mark: str) -> int:
    """Take ``seconds``; the file ``mark`` has this process's id as soon as it runs."""
    _leave(mark)
    time.sleep(seconds)
    return os.getpid()


def spin(mark: str) -> None:
    """Keep a core busy for much longer than any test waits; ``mark`` as in ``sleep``."""
    _leave(mark)
    end = time.monotonic() + 600
    while time.monotonic() < end:
        pass


def _leave(mark: str) -> None:
    # Renamed, so that nobody reads half of it.
    draft = Path(f"{mark}.{os.getpid()}")
    draft.write_text(str(os.getpid()))
    draft.rename(mark)
