"""What a task on one of asyncio's own event loops awaits while its call runs.

A future wakes its task in the loop's next turn, and before that the loop asks its selector once
more, which takes as long as the whole of a tiny call's pickling. The callback that has read an
outcome has nothing else to do afterwards, so it lets the task go on itself: ``resume``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any

__all__ = ["Answer", "awaitable_on"]


class Answer:
    """A future without a result, for the one task that awaits it; on its loop's thread."""

    # What asyncio knows a future by, and the task sets when it has begun to wait.
    _asyncio_future_blocking = False

    def __init__(self, home: asyncio.AbstractEventLoop) -> None:
        self._home = home
        self._done = False
        self._cancelled: tuple[object, ...] | None = None  # what with
        # Only while the task waits, and in no variable when it goes on: it may keep an error whose
        # traceback has this frame as well, and would be in a circle with it.
        self._wake: list[Callable[[Answer], object]] = []
        self._context: Context | None = None

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of the task."""
        return self._home

    def done(self) -> bool:
        """Whether the task goes on, or is about to."""
        return self._done

    def result(self) -> None:
        """``CancelledError`` if the task was cancelled; else nothing."""
        if self._cancelled is not None:
            raise asyncio.CancelledError(*self._cancelled)

    def set_result(self, _: None) -> None:
        """Let the task go on in the loop's next turn."""
        self._done = True
        if self._wake:
            self._home.call_soon(self._wake.pop(), self, context=self._context)

    def resume(self) -> None:
        """Let the task go on now. From a callback of its loop, when that has done all else."""
        self._done = True
        if self._wake:
            assert self._context is not None
            self._context.run(self._wake.pop(), self)

    def cancel(self, msg: object = None) -> bool:
        """The task is cancelled; false if it goes on already."""
        if self._done:
            return False
        self._cancelled = () if msg is None else (msg,)
        self.set_result(None)
        return True

    def add_done_callback(self, callback: Callable[[Answer], object], *, context: Context) -> None:
        """The task begins to wait, and is woken by ``callback``."""
        self._wake.append(callback)
        self._context = context

    def __await__(self) -> Generator[Any, None, None]:
        if not self._done:
            self._asyncio_future_blocking = True
            yield self
        self.result()


def awaitable_on(home: asyncio.AbstractEventLoop) -> Answer | asyncio.Future[None]:
    """What is quickest there: uvloop wakes a task that awaits one of its futures sooner."""
    return Answer(home) if isinstance(home, asyncio.BaseEventLoop) else home.create_future()
