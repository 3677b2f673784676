"""What a function says of its progress while it runs, and who hears it.

The function's side is ``leasepool_django.worker``; how what it says gets here is the backend's.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

__all__ = ["Listener", "OnProgress", "checked_listener"]

OnProgress = Callable[[Any], object]


class Listener:
    """Passes on what the function of one call says, in the context of its caller.

    ``hand_over`` runs a job on another thread: there it is logged if ``on_progress`` raises.
    """

    def __init__(
        self,
        on_progress: OnProgress,
        home: asyncio.AbstractEventLoop | None,
        name: str,
        hand_over: Callable[[Callable[[], None]], None],
    ) -> None:
        self._on_progress = on_progress
        self._home = home
        self._name = name
        self._hand_over = hand_over
        self._context = copy_context()
        self._values: deque[object] = deque()  # said on other threads than the loop's
        self._closed = False

    def hear(self, value: object) -> None:
        """On the thread of the caller's loop, or for a blocking caller on any."""
        if self._closed:
            return
        try:
            self._context.run(self._on_progress, value)
        except (Exception, asyncio.CancelledError, GeneratorExit) as error:  # noqa: BLE001
            # The call is not at fault. What ends a program goes on to do so.
            self._hand_over(partial(_failed, self._name, "raised", error))

    def cannot_read(self, error: BaseException) -> None:
        """A value cannot be unpickled here."""
        self._hand_over(partial(_failed, self._name, "cannot be told what was reported:", error))

    def hear_from_anywhere(self, value: object) -> None:
        """``hear``, on any thread."""
        if self._home is None:
            self.hear(value)
            return
        self._values.append(value)
        try:
            self._home.call_soon_threadsafe(self._hear_all)
        except RuntimeError:
            return  # its loop is closed: nobody is left to tell

    def finish(self) -> None:
        """On the caller's thread: hear what has been said; nothing that comes later."""
        self._hear_all()
        self._closed = True

    def close(self) -> None:
        """The caller has gone, and hears nothing any more."""
        self._closed = True

    def _hear_all(self) -> None:
        while self._values:
            self.hear(self._values.popleft())


def checked_listener(on_progress: OnProgress | None) -> OnProgress | None:
    """Return ``on_progress`` if it is a plain callable or ``None``; ``TypeError`` if not."""
    if on_progress is None:
        return None
    if not callable(on_progress):
        raise TypeError(f"on_progress must be callable, not {on_progress!r}.")
    own = getattr(type(on_progress), "__call__", None)  # noqa: B004 - itself
    if inspect.iscoroutinefunction(on_progress) or inspect.iscoroutinefunction(own):
        raise TypeError(
            "on_progress must be a plain function: it is called on the event loop, between two "
            "steps of it. Pass the put_nowait of an asyncio.Queue, and await its get()."
        )
    return on_progress


def _failed(name: str, what: str, error: BaseException) -> None:
    logging.getLogger("leasepool").error(
        "on_progress of a call of %s %s %r", name, what, error, exc_info=error
    )
