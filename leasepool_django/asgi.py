"""``LeasePoolLifespan``: starts the pools with the server and stops them with it.

Wrap the ASGI application in it. It answers the lifespan protocol
(https://asgi.readthedocs.io/en/latest/specs/lifespan.html), together with an inner application
that has a lifespan of its own, and never raises there: a server takes an exception for "no
lifespan" and would start without pools. Every other scope passes through untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from types import FrameType
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from .exceptions import LeasePoolError
from .handler import pools

__all__ = ["LeasePoolLifespan"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# Frameworks disagree on the types of the three arguments.
Application = Callable[..., Awaitable[None]]
Handler = Callable[[int, FrameType | None], Any]

logger = logging.getLogger(__name__)

STATE_KEY = "leasepool"
# In the lifespan scope: an outer wrapper has the pools in its care.
MARK = "leasepool_django.lifespan"
# What applications without lifespan raise when they meet the scope: Django and Channels a
# ValueError, others fail an assertion. Anything else, or later, may be a start-up that went wrong.
UNSUPPORTED = (ValueError, AssertionError, NotImplementedError)
# After a stop signal, until the pools hear of it. Ctrl-C often reaches a server process twice, from
# the terminal and from its parent, and granian's can hang for good when other threads wake up
# between the two.
SETTLE_SECONDS = 0.1
DJANGO_SAYS = "Django can only handle ASGI/HTTP connections"


class LeasePoolLifespan:
    """An ASGI application: ``app``, with the pools started before it and stopped after it.

    ``pools`` are in ``scope["state"]["leasepool"]`` where the server gives a state.
    """

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan of the server process."""
        if scope["type"] != "lifespan" or MARK in scope:
            await self.app(scope, receive, send)
        else:
            scope[MARK] = True
            await self._lifespan(scope, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        startup = await receive()
        try:
            await pools.start_all()
        except Exception as error:  # noqa: BLE001 - the server gets it, with a readable text
            await send(_failed("startup", "The lease pools did not start", error))
            return
        inner = _InnerLifespan(self.app, scope)
        try:
            if "state" in scope:
                scope["state"][STATE_KEY] = pools
            answer = await inner.ask(startup)
            if answer is not None and answer["type"] == "lifespan.startup.failed":
                await _stop_pools(answer)
            else:
                await send(answer or {"type": "lifespan.startup.complete"})
                with _stop_signals_noticed():
                    shutdown = await receive()
                answer = await inner.ask(shutdown)
                answer = await _stop_pools(answer or {"type": "lifespan.shutdown.complete"})
        finally:
            # After a forced exit there is no shutdown message: this task is cancelled in
            # receive(), and the loop may not run for long. Otherwise nothing is left to stop.
            pools.stop_all_sync(grace=0)
            await inner.end()
        # Last, with nothing to await after it: hypercorn cancels this task upon the answer.
        await send(answer)


@contextlib.contextmanager
def _stop_signals_noticed() -> Iterator[None]:
    """Begin to drain the pools when the server is told to stop, not only when it has finished.

    A server lets its requests end before it says ``lifespan.shutdown``. Until then callers in line
    would go on waiting for workers, and one long call would keep the server for as long as it
    takes. The server's own handlers are called as before.
    """
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def notice() -> None:
        timers.append(loop.call_later(SETTLE_SECONDS, pools.request_stop))

    def draining(theirs: Handler) -> Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                loop.call_soon_threadsafe(notice)
            except RuntimeError:
                pass  # the loop is closed, and the server's handler must be called all the same
            theirs(number, frame)

        return handle

    ours: dict[int, tuple[Handler, Handler]] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere it is not possible
        for watched in (signal.SIGINT, signal.SIGTERM):
            theirs = signal.getsignal(watched)
            # SIG_DFL ends the process without running Python; SIG_IGN is there for a reason.
            if callable(theirs):
                ours[watched] = draining(theirs), theirs
                signal.signal(watched, ours[watched][0])
    try:
        yield
    finally:
        for number, (handler, theirs) in ours.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, theirs)
        for timer in timers:
            timer.cancel()


async def _stop_pools(answer: Message) -> Message:
    """Stop the pools; ``answer``, or what to answer instead because they did not stop."""
    try:
        await pools.stop_all()
    except Exception as error:
        logger.exception("The lease pools did not stop cleanly")
        if answer["type"] == "lifespan.shutdown.complete":
            return _failed("shutdown", "The lease pools did not stop cleanly", error)
    return answer


def _failed(phase: str, summary: str, error: Exception) -> Message:
    return {"type": f"lifespan.{phase}.failed", "message": f"{summary}: {_readable(error)}"}


def _readable(error: Exception) -> str:
    """The text of ``error``, with the traceback that tells most: the worker's if there is one."""
    text = f"{type(error).__name__}: {error}"
    worker_traceback = (getattr(error, "traceback_text", None) or "").strip()
    if worker_traceback:
        if worker_traceback not in text:
            text = f"{text}\n\nIn the worker:\n{worker_traceback}"
    elif not isinstance(error, (LeasePoolError, ImproperlyConfigured)):
        text = f"{text}\n{''.join(traceback.format_exception(error))}"
    notes = getattr(error, "__notes__", ())
    return "\n".join((text.rstrip(), *notes))


class _InnerLifespan:
    """The lifespan of the wrapped application, in a task with channels of its own.

    It gets the server's own scope, since the state in it is shared.
    """

    def __init__(self, app: Application, scope: Scope) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._has_listened = False
        self._answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(app, scope))

    async def ask(self, message: Message) -> Message | None:
        """Pass ``message`` on and return the answer; ``None`` if there is nobody to answer."""
        if self._task.done():
            return None
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._messages.put_nowait(message)
        await asyncio.wait({answer, self._task}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None

    async def end(self) -> None:
        """Cancel what is left of the application's lifespan, and wait for it."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _receive(self) -> Message:
        self._has_listened = True
        return await self._messages.get()

    async def _send(self, message: Message) -> None:
        if not self._answer.done():
            self._answer.set_result(message)

    async def _run(self, app: Application, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            if isinstance(error, UNSUPPORTED) and not self._has_listened:
                level = logging.DEBUG if DJANGO_SAYS in str(error) else logging.INFO
                logger.log(level, "The wrapped application has no lifespan: %s", _one_line(error))
            else:
                logger.warning(
                    "The wrapped application failed in its lifespan; it is served without one",
                    exc_info=True,
                )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
