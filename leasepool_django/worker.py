"""What a function may use inside a worker. Light to import: the standard library only."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

__all__ = ["Reporting", "in_inline_call", "in_worker", "report_progress", "reporting"]


class _State:
    in_worker = False


_state = _State()


def in_worker() -> bool:
    """Whether this process is a worker, or the fork server that makes workers."""
    return _state.in_worker


def mark_worker() -> None:
    """Called once, first thing, in the fork server and in every worker."""
    _state.in_worker = True


_inline_call: ContextVar[bool] = ContextVar("leasepool_inline_call", default=False)


def in_inline_call() -> bool:
    """Whether the caller is part of a call that the ``inline`` backend runs in this process."""
    return _inline_call.get()


def enter_inline_call() -> None:
    """Called in the context of such a call, before its function."""
    _inline_call.set(True)


# -- progress --------------------------------------------------------------------------------------

Send = Callable[[Any], None]


def report_progress(value: object) -> None:
    """Tell the caller how far this call is: ``value`` is what its ``on_progress`` is called with.

    ``value`` can be anything that can be pickled. Does nothing where nobody listens: in a call
    without ``on_progress``, once the call has ended, and where the function is called plainly.
    Threads report if they run in a copy of the call's context, as those of ``asyncio.to_thread``.
    ``NotPicklableError`` if ``value`` cannot travel.
    """
    reporter = _reporter.get()
    if reporter is not None:
        reporter.report(value)


class _Reporter:
    """Sends what one call reports, until that has ended."""

    def __init__(self, send: Send) -> None:
        # Nothing may follow the outcome. One that is taken again where a value's own code reports
        # while it is pickled, or a signal handler does.
        self._lock = threading.RLock()
        self._send: Send | None = send
        self._pid = os.getpid()

    def report(self, value: object) -> None:
        if os.getpid() != self._pid:
            return  # a child of the function's making, in which the lock may be held for ever
        with self._lock:
            if self._send is not None:
                self._send(value)

    def close(self) -> None:
        with self._lock:
            self._send = None


_reporter: ContextVar[_Reporter | None] = ContextVar("leasepool_reporter", default=None)


def reports() -> bool:
    """Whether what is reported in this context is heard by somebody."""
    return _reporter.get() is not None


def report_nothing() -> None:
    """From now on, in this context."""
    _reporter.set(None)


class Reporting(NamedTuple):
    """Travels in the place of a ``function`` whose caller listens, if that has no name."""

    function: Callable[..., Any]


def reporting(send: Send, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``function``, with what it reports given to ``send``."""
    reporter = _Reporter(send)
    token = _reporter.set(reporter)
    try:
        return function(*args, **kwargs)
    finally:
        reporter.close()
        _reporter.reset(token)
