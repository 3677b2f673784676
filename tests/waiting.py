"""Waiting in tests: on a condition, up to a deadline; never for a fixed time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["NotInTimeError", "async_wait_until", "wait_until"]

T = TypeVar("T")


class NotInTimeError(AssertionError):
    """The condition did not come true before the deadline."""


def wait_until(
    predicate: Callable[[], T], *, timeout: float = 10.0, message: str | Callable[[], str] = ""
) -> T:
    """Poll until ``predicate()`` is true, and return its value.

    ``timeout`` is in seconds; after it ``NotInTimeError`` carries ``message``, which may be a
    function that describes the state at that moment.
    """
    for pause in _pauses(timeout):
        if value := predicate():
            return value
        time.sleep(pause)
    return _last_look(predicate, timeout, message)


async def async_wait_until(
    predicate: Callable[[], T], *, timeout: float = 10.0, message: str | Callable[[], str] = ""
) -> T:
    """Do as ``wait_until``, in a coroutine: the event loop goes on running between two polls."""
    for pause in _pauses(timeout):
        if value := predicate():
            return value
        await asyncio.sleep(pause)
    return _last_look(predicate, timeout, message)


def _pauses(timeout: float) -> Iterator[float]:
    """Yield the seconds to pause between polls, short ones first, until ``timeout`` is over."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while (left := deadline - time.monotonic()) > 0:
        yield min(pause, left)
        pause = min(pause * 2, 0.05)


def _last_look(predicate: Callable[[], T], timeout: float, message: str | Callable[[], str]) -> T:
    """Ask once more after the deadline: on a busy machine the condition may have come true."""
    if value := predicate():
        return value
    text = message if isinstance(message, str) else message()
    raise NotInTimeError(f"not within {timeout:g} s: {text or predicate}")
