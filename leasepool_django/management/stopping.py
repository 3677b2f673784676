"""How a management command ends that runs calls: at its end, by signals, or where nobody reads.

The exit status is 130 and 143 after Ctrl-C and SIGTERM, and 141 when nobody reads the results any
more.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from django.core.management.base import BaseCommand, CommandError, OutputWrapper

from ..backends.base import Backend
from .report import OutputError, Printer

__all__ = ["INTERRUPTED", "StoppableCommand"]

INTERRUPTED = 130
_TERMINATED = 143
_OUTPUT_CLOSED = 141

# Seconds after the first Ctrl-C from which another one raises, where the loop has not turned to
# that one yet, and where it has.
_DEAF = 1.0
_SLOW = 10.0


class StoppableCommand(BaseCommand):
    """A command whose calls end with it, whatever ends it.

    ``has_own_process``: ``manage.py`` runs it, and not ``call_command``. ``calls_run_on``: a call
    was given up that the backend cannot stop.
    """

    has_own_process = False
    calls_run_on = False
    # While calls run on the event loop: cancels them, however often it is called.
    _cancel_calls: Callable[[], None] | None = None

    def run_from_argv(self, argv: list[str]) -> None:
        """Called by ``manage.py``, which ends with this command; ``call_command`` does not."""
        self.has_own_process = True
        if sys.stderr is None:  # closed, as by ``2>&-``: what is said there is said to nobody
            self.stderr = OutputWrapper(io.StringIO())
        try:
            try:
                super().run_from_argv(argv)
            finally:
                _discard_unwritable()
        except SystemExit as ending:
            if self.calls_run_on:
                # A normal exit would wait for them, in threads or in processes of the standard
                # library's kind.
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(ending.code if isinstance(ending.code, int) else 1)
            raise

    def run_on_loop(self, work: Coroutine[Any, Any, float]) -> float:
        """Run ``work``; ``KeyboardInterrupt``, once it has ended, if signals asked for that.

        Signals cancel it, and only once: an exception that a signal handler raises between two
        steps of the loop may undo one of them, and what was to follow never comes. Only where the
        loop does not turn to that, as while nobody reads what it writes, one is raised.
        """
        asked_at: float | None = None
        heard = False

        async def cancellable() -> float:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None

            def cancel_now() -> None:
                nonlocal heard
                heard = True
                task.cancel()

            def cancel() -> None:
                nonlocal asked_at
                if asked_at is None:
                    asked_at = time.monotonic()
                    with contextlib.suppress(RuntimeError):  # just closed
                        loop.call_soon_threadsafe(cancel_now)
                elif time.monotonic() - asked_at > (_SLOW if heard else _DEAF):
                    raise KeyboardInterrupt

            self._cancel_calls = cancel
            return await work

        main = cancellable()
        try:
            seconds = asyncio.run(main)
        except asyncio.CancelledError:
            if asked_at is None:
                raise
        finally:
            if asked_at is None:  # else more signals go on to change nothing
                self._cancel_calls = None
            for one in (main, work):
                one.close()  # if it has not begun
        if asked_at is not None:
            raise KeyboardInterrupt
        return seconds

    @contextlib.contextmanager
    def stopped_by_signals(self, report: Printer, backend: type[Backend]) -> Iterator[None]:
        """Turn Ctrl-C and SIGTERM into one line and an exit status."""
        status = 0

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal status
            # SIGTERM also where both came at once, whichever is handled first.
            status = _TERMINATED if number == signal.SIGTERM else status or INTERRUPTED
            if self._cancel_calls is not None:
                self._cancel_calls()
            else:
                signal.default_int_handler(number, frame)

        previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, handle)
            # Where Ctrl-C is ignored, as in a background job, or somebody else's, it stays so.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                previous[signal.SIGINT] = signal.signal(signal.SIGINT, handle)
        try:
            yield
        except KeyboardInterrupt:
            # The end is near, and a second signal would only change how it looks.
            if self.has_own_process:
                for which in (signal.SIGINT, signal.SIGTERM):
                    # One that has arrived and was not handled yet needs a handler.
                    signal.signal(which, _nothing)
                    signal.signal(which, signal.SIG_IGN)
                previous.clear()
            what = "Terminated" if status == _TERMINATED else "Interrupted"
            report.stopped(what)
            self._leave(backend, status or INTERRUPTED)
        finally:
            self._cancel_calls = None
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def stopped_by_broken_output(
        self, report: Printer, backend: type[Backend] | None = None
    ) -> Iterator[None]:
        """End when results cannot be written; quietly where nobody reads, as in ``… | head -1``.

        ``backend``: that of the calls, if there are any.
        """
        try:
            yield
        except* OutputError:
            report.close()
        match report.broken:
            case BrokenPipeError():
                self._leave(backend, _OUTPUT_CLOSED)
            case OSError() as error:
                self.calls_run_on |= backend is not None and not backend.supports_kill
                why = error.strerror or error
                raise CommandError(f"The results cannot be written: {why}.") from error

    def _leave(self, backend: type[Backend] | None, status: int) -> NoReturn:
        """End with ``status``; ``run_from_argv`` sees to it that calls which run on are left."""
        self.calls_run_on |= backend is not None and not backend.supports_kill
        sys.exit(status)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal that no longer matters."""


def _discard_unwritable() -> None:
    """Let go of what cannot be written: Python tries once more when it ends, and would complain."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
