"""Running calls and waiting for workers: what a caller does on its own loop or thread.

``LeasedExecutorManager``, ``ExecutorLease`` and the lease's executor all come here. Each way
exists twice: awaiting, and blocking (``_sync``). No lock is held while anything waits.
"""

from __future__ import annotations

import asyncio
import math
import threading
from asyncio import get_running_loop
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..exceptions import LeasePoolError, LeaseTimeoutError, UnsupportedBackendError
from .answer import awaitable_on
from .config import duration, positive_int
from .coroutines import refuse_running_loop
from .lease import ExecutorLease, LeaseState
from .line import DONE, Call, Request, Waiter
from .progress import Listener, OnProgress

if TYPE_CHECKING:
    from ..backends.base import Backend
    from .config import ManagerConfig
    from .manager import LeasedExecutorManager
    from .supervisor import Supervisor

__all__ = ["Calls", "checked_owner"]

P = ParamSpec("P")
T = TypeVar("T")


class Calls:
    """The callers' side of one manager. ``manager`` is asked to start if it does not run."""

    def __init__(
        self,
        manager: LeasedExecutorManager,
        config: ManagerConfig,
        backend: Backend,
        supervisor: Supervisor,
    ) -> None:
        self._ensure_running = manager.ensure_running
        self._ensure_running_sync = manager.ensure_running_sync
        self._config = config
        self._backend = backend
        self._encode = backend.encode
        self._supervisor = supervisor
        self._dispatcher = supervisor.dispatcher
        self._carries_context = config.process_logging.enabled
        supervisor.dispatcher.time_out = self._time_out
        self.acquire_timeout = config.acquire_timeout
        self.call_timeout = config.call_timeout

    # -- calls -------------------------------------------------------------------------------------

    async def run(
        self,
        lease: LeaseState | None,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        call_timeout: float | None,
        owner: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> T:
        """Run ``fn`` on a worker of ``lease``, or on one leased for this call."""
        home = get_running_loop()
        if self._dispatcher.closed is not None and lease is None:
            await self._ensure_running()
        try:
            call = self.new_call(home, fn, args, kwargs, call_timeout, owner, on_progress)
        finally:
            # Error reports show the variables of frames in a traceback: arguments may be secret.
            del args, kwargs
        try:
            if lease is None:
                worker = self._dispatcher.begin(call)
            else:
                worker = self._dispatcher.begin_in(lease, call)
            call.patience = timeout
            if worker is None:
                await self._wait(call, home, timeout)
            else:
                worker.begin(call, home, eager=True)
                if call.state != DONE:
                    call.future = awaitable_on(home)
                    await call.future
        except GeneratorExit:
            # Closed by the garbage collector or a dying loop, perhaps inside a critical section.
            if call.listener is not None:
                call.listener.close()
            self._supervisor.post(partial(self._give_up, call))
            raise
        except BaseException:
            self._abandon(call)
            call.payload = None  # see _taken_error
            raise
        if call.listener is not None:
            call.listener.finish()
        if call.error is None:
            return call.value  # type: ignore[no-any-return]
        error = _taken_error(call)
        try:
            raise error
        finally:
            del call, error  # the error's traceback refers to this frame

    def new_call(
        self,
        home: asyncio.AbstractEventLoop | None,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call_timeout: float | None,
        owner: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Call:
        """Encode a call; what cannot be sent is refused here."""
        try:
            if on_progress is None:
                call = Call(home, fn, self._encode(fn, args, kwargs), call_timeout)
            else:
                call = self._reporting_call(home, fn, args, kwargs, call_timeout, on_progress)
        except LeasePoolError as error:
            refusal = error.with_traceback(None)  # its frames show the arguments
        else:
            if self._carries_context:
                call.context = copy_context()
            if owner is not None:
                call.owner = owner
            return call
        del args, kwargs
        raise refusal

    def _reporting_call(
        self,
        home: asyncio.AbstractEventLoop | None,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call_timeout: float | None,
        on_progress: OnProgress,
    ) -> Call:
        """A call whose function may say how far it is."""
        if not self._backend.supports_progress:
            raise UnsupportedBackendError(
                f"The backend {self._backend.name!r} cannot tell on_progress anything: use "
                "'process'."
            )
        call = Call(home, fn, None, call_timeout)
        supervisor = self._supervisor
        call.listener = Listener(on_progress, home, call.function_name, supervisor.hand_over)
        try:
            call.payload = self._encode(fn, args, kwargs, listener=call.listener)
        finally:
            del args, kwargs
        return call

    def run_sync(self, lease: LeaseState | None, call: Call, timeout: float | None) -> Any:
        """Run a ``new_call`` without a home, and block until it is done.

        ``RuntimeError`` on the thread of a running event loop.
        """
        refuse_running_loop("run_sync(...)", "await run(...)")
        if self._dispatcher.closed is not None and lease is None:
            self._ensure_running_sync()
        call.wakeup = _locked()
        try:
            if lease is None:
                worker = self._dispatcher.begin(call)
            else:
                worker = self._dispatcher.begin_in(lease, call)
            while worker is not None or self._wait_sync(call, timeout):
                worker = worker or call.worker
                assert worker is not None
                worker.run_blocking(call)
                if call.state == DONE or call.error is not None:
                    break
                worker = None  # it had died before; the call stands in line again
        except BaseException:
            self._abandon(call)
            call.payload = None
            raise
        if call.listener is not None:
            call.listener.finish()
        if call.error is None:
            return call.value
        error = _taken_error(call)
        try:
            raise error
        finally:
            del call, error

    # -- leases ------------------------------------------------------------------------------------

    async def acquire(
        self,
        owner: str | None,
        lease_seconds: float | None,
        timeout: float | None,
        workers: int | None,
        *,
        wait: bool,
    ) -> ExecutorLease:
        """See ``LeasedExecutorManager.acquire``."""
        home = get_running_loop()
        request = self._request(home, owner, lease_seconds, workers)
        patience = self._patience(timeout)
        if self._dispatcher.closed is not None:
            await self._ensure_running()
        try:
            if not self._dispatcher.request(request, wait=wait):
                await self._wait(request, home, patience)
            return self._leased(request)
        except GeneratorExit:
            self._supervisor.post(partial(self._give_up, request))
            raise
        except BaseException:
            self._abandon(request)
            raise

    def acquire_sync(
        self,
        owner: str | None,
        lease_seconds: float | None,
        timeout: float | None,
        workers: int | None,
        *,
        wait: bool,
    ) -> ExecutorLease:
        """See ``LeasedExecutorManager.acquire_sync``."""
        refuse_running_loop("acquire_sync(...)", "await acquire(...)")
        request = self._request(None, owner, lease_seconds, workers)
        patience = self._patience(timeout)
        if self._dispatcher.closed is not None:
            self._ensure_running_sync()
        request.wakeup = _locked()
        try:
            if not self._dispatcher.request(request, wait=wait):
                self._wait_sync(request, patience)
            return self._leased(request)
        except BaseException:  # a signal handler may raise anywhere
            self._abandon(request)
            raise

    def release(self, lease: LeaseState) -> None:
        """Give a lease back. Idempotent, never waits."""
        if self._dispatcher.release(lease):
            self._supervisor.lease_ended(lease)

    def release_later(self, release: Callable[[], None]) -> None:
        """From a finalizer, at any moment: have ``release`` run on the housekeeper's thread."""
        self._supervisor.post(release)

    def extend(self, lease: LeaseState, seconds: float) -> None:
        """Let a lease expire ``seconds`` from now."""
        if seconds != math.inf:
            duration("seconds", seconds)
        self._dispatcher.extend(lease, seconds)
        self._supervisor.housekeeper.wake_by(lease.soft_expires_at)

    def lease_dropped(self, lease: LeaseState) -> None:
        """From a finalizer, at any moment: post, and nothing else."""
        self._supervisor.post(lambda: self._supervisor.return_dropped(lease))

    def _request(
        self,
        home: asyncio.AbstractEventLoop | None,
        owner: str | None,
        lease_seconds: float | None,
        workers: int | None,
    ) -> Request:
        config = self._config
        checked_owner(owner)
        size = config.workers_per_pool
        if workers is None:
            workers = size
        elif positive_int("workers", workers) > size:
            raise ValueError(
                f"workers must be at most workers_per_pool ({size}), not {workers!r}: a lease is "
                "part of one pool."
            )
        if lease_seconds is None:
            lease_seconds = config.default_lease_seconds
        elif lease_seconds != math.inf:
            lease_seconds = duration("lease_seconds", lease_seconds)
        grace = config.lease_grace_seconds
        return Request(home, workers, owner, lease_seconds, grace)

    def _patience(self, timeout: float | None) -> float | None:
        return self.acquire_timeout if timeout is None else duration("timeout", timeout)

    def _leased(self, request: Request) -> ExecutorLease:
        if request.error is not None:
            raise request.error
        state = request.lease
        assert state is not None
        lease = ExecutorLease(self, state)
        self._supervisor.lease_begun(state)
        return lease

    # -- waiting -----------------------------------------------------------------------------------

    async def _wait(
        self, waiter: Waiter, home: asyncio.AbstractEventLoop, timeout: float | None
    ) -> None:
        waiter.future = home.create_future()
        if timeout is None:
            await waiter.future
            return
        timer = home.call_later(timeout, self._time_out, waiter, timeout)
        try:
            await waiter.future
        finally:
            timer.cancel()

    def _wait_sync(self, waiter: Waiter, timeout: float | None) -> bool:
        """Wait for a grant; false if there is an error instead."""
        assert waiter.wakeup is not None
        if not waiter.wakeup.acquire(timeout=-1 if timeout is None else timeout):
            assert timeout is not None
            if self._time_out(waiter, timeout):
                return False
            waiter.wakeup.acquire()  # granted at the last moment: the wake-up is on its way
        return self._dispatcher.take_up(waiter)

    def _time_out(self, waiter: Waiter, timeout: float) -> bool:
        def error() -> LeaseTimeoutError:
            waiting = len(self._dispatcher.line)
            trouble = self._supervisor.start_trouble()
            return LeaseTimeoutError(
                f"No lease of {waiter.workers} worker(s) of {self._config.name_prefix!r} came "
                f"within {timeout:g} s; {waiting} other caller(s) wait."
                + (f" Workers cannot be started: {trouble}" if trouble else ""),
                waited=timeout,
                waiting=waiting,
                retry_after=self._dispatcher.estimated_wait(),
            )

        return self._dispatcher.leave(waiter, error)

    def _abandon(self, waiter: Waiter) -> None:
        if isinstance(waiter, Call) and waiter.listener is not None:
            waiter.listener.close()
        try:
            self._give_up(waiter)
        except BaseException:  # of a signal handler: once more, on a thread that has none
            self._supervisor.post(partial(self._give_up, waiter))
            raise

    def _give_up(self, waiter: Waiter) -> None:
        worker = self._dispatcher.abandon(waiter)
        if worker is not None:
            worker.kill(asyncio.CancelledError)


def _taken_error(call: Call) -> BaseException:
    """The error of a call, which keeps neither it nor what was sent.

    Others may refer to the call for a while, as the worker does that was killed for it. A
    memoryview that becomes garbage together with what was made of it for sending crashes the
    interpreter, up to Python 3.12.6 (gh-77894).
    """
    error, call.error, call.payload = call.error, None, None
    assert error is not None
    return error


def checked_owner(owner: str | None) -> str | None:
    """Return ``owner`` if it is text or ``None``; ``TypeError`` if not."""
    if owner is not None and not isinstance(owner, str):
        raise TypeError(f"owner must be text, not {owner!r}.")
    return owner


def _locked() -> Any:
    lock = threading.Lock()
    lock.acquire()
    return lock
