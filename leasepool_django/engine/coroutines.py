"""Plain functions that return a coroutine, and blocking ones that no event loop's thread may call.

``manager.run`` and its like are of the first kind: with a frame of their own, error reports would
show the arguments of calls. ``async_to_sync`` and others ask before they call. ``shared`` waits for
what several wait for.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["coroutine_function", "refuse_running_loop", "shared"]

F = TypeVar("F", bound=Callable[..., Any])


def coroutine_function(function: F) -> F:
    """Mark ``function``, for ``inspect``, ``asyncio`` and ``asgiref``."""
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    mark = getattr(asyncio.coroutines, "_is_coroutine")  # noqa: B009 - asyncio 3.11 looks for it
    setattr(function, "_is_coroutine", mark)  # noqa: B010
    return function


def refuse_running_loop(spelling: str, instead: str) -> None:
    """Raise ``RuntimeError`` on a running event loop's thread; it names what to use ``instead``."""
    if asyncio._get_running_loop() is not None:  # private: the public one raises, which is slower
        raise RuntimeError(
            f"{spelling} would block the event loop that runs on this thread, and everything it "
            f"serves. Use `{instead}` instead, or call it on another thread: "
            "`await asyncio.to_thread(...)`."
        )


async def shared(future: Future[None]) -> None:
    """Wait for what others wait for too: one who is cancelled must not cancel it for all."""
    mine = asyncio.wrap_future(future)
    mine.add_done_callback(_noticed)
    await asyncio.shield(mine)


def _noticed(future: asyncio.Future[None]) -> None:
    """Look at its error, or asyncio logs that nobody did, when all who waited have gone."""
    if not future.cancelled():
        future.exception()
