"""A lease as its holder sees it, and the state behind it that the dispatcher owns.

``ExecutorLease`` is the holder's; nothing inside the engine refers to it, so that a lease dropped
without release is found by the garbage collector. ``LeaseState`` is the engine's and is guarded
by the dispatcher's lock.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from ..exceptions import LeaseExpiredError, LeaseReleasedError
from .config import optional_duration
from .coroutines import coroutine_function
from .facade import LeaseExecutor
from .line import Call, Queue
from .progress import OnProgress, checked_listener

if TYPE_CHECKING:
    from .calls import Calls
    from .line import Slot

__all__ = ["ExecutorLease", "LeaseState"]

P = ParamSpec("P")
T = TypeVar("T")


class LeaseState(Queue[Call]):
    """The account of one lease: its slots, the calls that wait for one, and its deadlines."""

    def __init__(
        self,
        lease_id: str,
        owner: str | None,
        slots: list[Slot],
        lease_seconds: float,
        grace_seconds: float,
    ) -> None:
        super().__init__()
        self.lease_id = lease_id
        self.owner = owner
        self.workers = len(slots)
        self.lease_seconds = lease_seconds
        self.grace_seconds = grace_seconds
        self.begun = monotonic()
        self.soft_expires_at = self.begun + lease_seconds
        self.hard_expires_at = self.soft_expires_at + grace_seconds
        # The task or thread that is inside its `with`. Weak: a lease must not keep it alive.
        self.holder: Callable[[], object | None] = _nobody
        self.slots = set(slots)
        self.free = list(slots)  # slots of this lease with a ready worker and no call
        self.open = True  # takes new calls
        self.expired = False
        self.soft_expiry_told = False
        self.dropped = False  # its holder's object is gone; set without the lock
        # That object, once there is one. It says itself that it goes, unless it is interrupted.
        self.in_hands: Callable[[], object | None] | None = None
        self.gone_since = 0.0  # when it was missed first (monotonic)
        self.ended = False  # its manager has stopped
        self.inherited = False  # this process is a fork of the one that holds it

    def facts(self) -> dict[str, Any]:
        """The particulars of events about it."""
        return {"lease_id": self.lease_id, "owner": self.owner, "workers": self.workers}

    def refusal(self) -> LeaseExpiredError:
        """The error for a call on a lease that is over."""
        if self.expired:
            return LeaseExpiredError(
                f"Lease {self.lease_id} (owner {self.owner!r}) expired after "
                f"{self.hard_expires_at - self.begun:g} s and was revoked. Ask for a longer "
                "lease_seconds, or renew it with extend().",
                lease_id=self.lease_id,
                owner=self.owner,
            )
        if self.inherited:
            why = "is held by the parent of this process"
        elif self.ended:
            why = "ended when its manager stopped"
        elif self.dropped:
            why = "was dropped without release"
        else:
            why = "has been released"
        return LeaseReleasedError(
            f"Lease {self.lease_id} (owner {self.owner!r}) {why} and takes no new calls. Acquire "
            "another one.",
            lease_id=self.lease_id,
            owner=self.owner,
        )


def _nobody() -> None:
    return None


class LeaseOptions:
    """``lease.options(call_timeout=…)``: runs calls of a lease with settings of their own."""

    def __init__(
        self,
        lease: ExecutorLease,
        calls: Calls,
        state: LeaseState,
        call_timeout: float | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._lease = lease  # as long as this is used, it is not dropped
        self._calls = calls
        self._state = state
        self._call_timeout = calls.call_timeout if call_timeout is None else call_timeout
        self._on_progress = on_progress

    @coroutine_function
    def run(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[None, None, T]:
        """As ``ExecutorLease.run``."""
        return self._calls.run(
            self._state, fn, args, kwargs, None, self._call_timeout, None, self._on_progress
        )

    def run_sync(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """As ``ExecutorLease.run_sync``."""
        try:
            call = self._calls.new_call(
                None, fn, args, kwargs, self._call_timeout, None, self._on_progress
            )
        finally:
            del args, kwargs
        result: T = self._calls.run_sync(self._state, call, None)
        return result


class ExecutorLease:
    """The right to use ``workers`` workers of one pool, until released or expired.

    At most ``workers`` calls run at once; further ones wait in the lease's own line, first in
    first out. Use it with ``async with`` or ``with``, or call ``release()`` yourself. Any thread
    and any event loop may use it.
    """

    def __init__(self, calls: Calls, state: LeaseState) -> None:
        self._calls = calls
        self._state = state
        self._executor: LeaseExecutor | None = None
        state.in_hands = weakref.ref(self)

    @property
    def lease_id(self) -> str:
        """Text that identifies the lease."""
        return self._state.lease_id

    @property
    def owner(self) -> str | None:
        """Who holds it, as given to ``acquire``."""
        return self._state.owner

    @property
    def workers(self) -> int:
        """How many calls may run at once."""
        return self._state.workers

    @property
    def ready(self) -> bool:
        """Whether all of its workers are there; false while one is replaced."""
        slots = self._state.slots
        return all(slot.worker is not None and not slot.worker.leaving for slot in slots)

    @property
    def lease_seconds(self) -> float:
        """The seconds it was taken for."""
        return self._state.lease_seconds

    @property
    def grace_seconds(self) -> float:
        """Seconds from the soft to the hard expiry."""
        return self._state.grace_seconds

    @property
    def soft_expires_at(self) -> float:
        """When a warning is logged (``time.monotonic()``; infinite if it never expires)."""
        return self._state.soft_expires_at

    @property
    def hard_expires_at(self) -> float:
        """When it is revoked and running calls are stopped (``time.monotonic()``)."""
        return self._state.hard_expires_at

    @coroutine_function
    def run(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[None, None, T]:
        """Run ``fn(*args, **kwargs)`` on a worker of this lease and return its result.

        Raises what ``fn`` raises; ``NotPicklableError`` before anything is sent;
        ``WorkerCrashedError``; ``CallTimeoutError``; ``LeaseExpiredError`` when the lease is over.
        Cancelling the awaiting task stops the call.
        """
        calls = self._calls
        return calls.run(self._state, fn, args, kwargs, None, calls.call_timeout)

    def run_sync(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``run`` for blocking code; not for use on the thread of a running event loop."""
        try:
            call = self._calls.new_call(None, fn, args, kwargs, self._calls.call_timeout)
        finally:
            del args, kwargs
        result: T = self._calls.run_sync(self._state, call, None)
        return result

    def options(
        self, *, call_timeout: float | None = None, on_progress: OnProgress | None = None
    ) -> LeaseOptions:
        """Settings for single calls: ``await lease.options(call_timeout=5).run(fn, …)``.

        See ``LeasedExecutorManager.options``.
        """
        call_timeout = optional_duration("call_timeout", call_timeout)
        listener = checked_listener(on_progress)
        return LeaseOptions(self, self._calls, self._state, call_timeout, listener)

    @property
    def executor(self) -> Executor:
        """A ``concurrent.futures.Executor`` over this lease, for libraries that want one."""
        if self._executor is None:
            self._executor = LeaseExecutor(self._calls, self._state)
        return self._executor

    async def extend(self, seconds: float) -> None:
        """Let the lease expire ``seconds`` from now; ``LeaseExpiredError`` if it is over."""
        self.extend_sync(seconds)

    def extend_sync(self, seconds: float) -> None:
        """``extend`` for blocking code. It does not wait for anything but a short-held lock."""
        self._calls.extend(self._state, seconds)

    async def release(self) -> None:
        """Give the lease back, without waiting. Idempotent.

        Calls that run go on to their end, with their workers; those that wait for a worker of the
        lease get ``LeaseReleasedError``.
        """
        self.release_sync()

    def release_sync(self) -> None:
        """``release`` for blocking code. Not for finalizers and signal handlers: it takes locks."""
        self._calls.release(self._state)
        if self._executor is not None:
            self._executor.close()

    async def __aenter__(self) -> Self:
        self._state.holder = weakref.ref(current_holder())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave(exc_type)

    def __enter__(self) -> Self:
        self._state.holder = weakref.ref(current_holder())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave(exc_type)

    def _leave(self, exc_type: type[BaseException] | None) -> None:
        if exc_type is GeneratorExit:
            # A coroutine or generator that the garbage collector closes, perhaps while this very
            # thread holds a lock that release_sync() takes.
            self._calls.release_later(self.release_sync)
        else:
            self.release_sync()

    def __repr__(self) -> str:
        state = self._state
        condition = "open" if state.open else "expired" if state.expired else "released"
        return (
            f"<ExecutorLease {state.lease_id} {condition} owner={state.owner!r} "
            f"workers={state.workers}>"
        )

    def __del__(self) -> None:
        # Runs at any moment, also while this very thread holds the dispatcher's lock: it may only
        # post. The state is missing when __init__ was never run.
        state = self.__dict__.get("_state")
        if state is not None and state.open:
            state.dropped = True
            self._calls.lease_dropped(state)


def current_holder() -> object:
    """What stands for the caller when leases are counted: its task, or else its thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return task if task is not None else threading.current_thread()
