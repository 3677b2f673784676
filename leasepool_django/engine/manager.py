"""``LeasedExecutorManager``: what callers use, and the start, sizing and end of its pools.

Its methods run on any thread and any event loop. The accounts are the dispatcher's, the clock is
the housekeeper's, the workers are the backend's; this module ties them together.

Long because it is the whole public face, and says what each argument means.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..backends.base import resolve
from ..exceptions import LeasePoolNotStartedError
from ..worker import in_worker
from .calls import Calls
from .config import (
    ExecutorBackend,
    ManagerConfig,
    ProcessLoggingConfig,
    duration,
    logging_arguments,
)
from .coroutines import coroutine_function, shared
from .events import Event, Subscriber
from .lease import ExecutorLease
from .options import CallOptions
from .progress import OnProgress
from .supervisor import Supervisor

if TYPE_CHECKING:
    from .stats import ManagerStats

__all__ = ["LeasedExecutorManager"]

P = ParamSpec("P")
T = TypeVar("T")

_live: weakref.WeakSet[LeasedExecutorManager] = weakref.WeakSet()


class LeasedExecutorManager:
    """Owns ``min_pools`` to ``max_pools`` pools of workers and hands out leases on them.

    ``backend``: ``"process"``, ``"thread"``, an ``ExecutorBackend`` or the dotted path of a
    ``concurrent.futures.Executor`` class; further keyword arguments go to it, and one it does not
    know is a ``TypeError`` here. ``workers_per_pool``: workers in a pool. Sizing: at least
    ``max(min_pools, ceil(size_provider() / units_per_pool))`` pools, looked at every
    ``check_interval`` seconds, and one more whenever the first in line finds no room, never above
    ``max_pools``. A lease lasts ``default_lease_seconds`` and is revoked ``lease_grace_seconds``
    later. ``acquire_timeout`` (seconds) and ``max_waiting`` bound the wait for a worker,
    ``call_timeout`` (seconds) bounds a call; ``None`` means no bound. ``stop()`` gives running
    calls ``shutdown_grace_seconds``. With ``forward_process_logs`` (or a ``process_logging``),
    log records of workers are handled in this process, in the caller's context.
    """

    def __init__(
        self,
        *,
        backend: ExecutorBackend | str = ExecutorBackend.PROCESS,
        max_pools: int,
        min_pools: int = 1,
        workers_per_pool: int = 4,
        units_per_pool: int = 10,
        size_provider: Callable[[], int] | None = None,
        check_interval: float = 120.0,
        default_lease_seconds: float = 300.0,
        lease_grace_seconds: float = 15.0,
        name_prefix: str = "leasepool",
        logger: logging.Logger | None = None,
        process_logging: ProcessLoggingConfig | None = None,
        forward_process_logs: bool = False,
        process_log_level: int | str = logging.INFO,
        process_log_target_logger: logging.Logger | str | None = None,
        clear_process_log_handlers: bool = True,
        acquire_timeout: float | None = None,
        max_waiting: int | None = None,
        call_timeout: float | None = None,
        shutdown_grace_seconds: float = 10.0,
        **executor_kwargs: Any,
    ) -> None:
        single = ProcessLoggingConfig(
            enabled=forward_process_logs,
            level=process_log_level,
            target_logger=process_log_target_logger,
            clear_child_handlers=clear_process_log_handlers,
        )
        if process_logging is None:
            process_logging = single
        elif given := logging_arguments(single):
            raise TypeError(f"Give either process_logging or {given[0]}, not both.")
        self._config = config = ManagerConfig(
            max_pools=max_pools,
            min_pools=min_pools,
            workers_per_pool=workers_per_pool,
            units_per_pool=units_per_pool,
            size_provider=size_provider,
            check_interval=check_interval,
            default_lease_seconds=default_lease_seconds,
            lease_grace_seconds=lease_grace_seconds,
            name_prefix=name_prefix,
            logger=logger,
            process_logging=process_logging,
            acquire_timeout=acquire_timeout,
            max_waiting=max_waiting,
            call_timeout=call_timeout,
            shutdown_grace_seconds=shutdown_grace_seconds,
        )
        config.check()
        kind = resolve(backend)
        if process_logging.enabled and not kind.supports_log_forwarding:
            raise ValueError(
                f"forward_process_logs=True needs a backend that forwards logs; {kind.name!r} "
                "does not. Leave it out: what runs in this process logs here anyway."
            )
        self._backend = kind(config, executor_kwargs)
        self._subscribers: list[Subscriber] = []
        self._set_up()
        _live.add(self)

    def _set_up(self) -> None:
        """Fresh state for a first start, or in the child after a fork."""
        self._supervisor = Supervisor(self._config, self._backend, self._subscribers)
        self._dispatcher = self._supervisor.dispatcher
        self._calls = Calls(self, self._config, self._backend, self._supervisor)

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start ``min_pools`` pools; returns when the first worker of each is ready. Idempotent.

        Raises ``WorkerStartError`` with the worker's traceback; then nothing is left running.
        """
        self._refuse_in_worker()
        await shared(self._supervisor.start())

    def start_sync(self) -> None:
        """``start`` for blocking code."""
        self._refuse_in_worker()
        self._supervisor.start().result()

    async def stop(self, *, grace: float | None = None) -> None:
        """Refuse new work, let calls run for ``grace`` seconds, then end everything. Idempotent.

        ``grace`` defaults to ``shutdown_grace_seconds``. Returns when no worker is left.
        """
        await shared(self._supervisor.stop(self._grace(grace)))

    def stop_sync(self, *, grace: float | None = None) -> None:
        """``stop`` for blocking code; needs neither a new thread nor a loop."""
        self._supervisor.stop(self._grace(grace)).result()

    def request_stop(self, *, grace: float | None = None, after: float = 0.0) -> None:
        """Begin to stop, ``after`` seconds from now; returns at once. Allowed in signal handlers.

        Running calls get ``grace`` seconds, as in ``stop``. So do leases: the requests that hold
        them are still being answered, until ``stop()`` says that they are not.
        """
        self._supervisor.request_stop(self._grace(grace), after)

    def _grace(self, grace: float | None) -> float:
        if grace is None:
            return self._config.shutdown_grace_seconds
        return duration("grace", grace, minimum=0)

    def _refuse_in_worker(self) -> None:
        if in_worker():
            raise LeasePoolNotStartedError(
                "A manager cannot be started inside a worker. If this happened while a worker "
                "imported your script, put the script's code under "
                "`if __name__ == '__main__':`."
            )

    async def ensure_running(self) -> None:
        """Called when work is asked for and the manager does not run; a subclass may start it."""
        self.ensure_running_sync()

    def ensure_running_sync(self) -> None:
        """``ensure_running`` for blocking callers."""
        why = self._dispatcher.closed
        if why is not None:  # or it has just started
            raise LeasePoolNotStartedError(f"The manager {self.name!r} {why}. Await start() first.")

    # -- calls -------------------------------------------------------------------------------------

    # Those named run are no coroutine functions but return the coroutine: the frames of coroutine
    # functions would stand in tracebacks, with the arguments in them, which may be secret.

    @coroutine_function
    def run(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[None, None, T]:
        """Run ``fn(*args, **kwargs)`` on one worker and return its result.

        The worker is leased for this one call. Raises what ``fn`` raises; ``LeaseTimeoutError``
        or ``LeaseUnavailableError`` when no worker can be had; ``NotPicklableError`` before
        anything is sent; ``WorkerCrashedError``; ``CallTimeoutError``. Cancelling the awaiting
        task stops the call.
        """
        calls = self._calls
        return calls.run(None, fn, args, kwargs, calls.acquire_timeout, calls.call_timeout)

    def run_sync(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``run`` for blocking code; not for use on the thread of a running event loop."""
        try:
            run = self.prepare_sync(fn, *args, **kwargs)
        finally:
            del args, kwargs
        return run()

    def prepare_sync(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Callable[[], T]:
        """Encode a call now and return what runs it, once: ``run_sync`` in two steps.

        For wrappers that must not have the arguments in their frame while the call runs.
        """
        calls = self._calls
        try:
            call = calls.new_call(None, fn, args, kwargs, calls.call_timeout)
        finally:
            del args, kwargs
        return partial(calls.run_sync, None, call, calls.acquire_timeout)

    def options(
        self,
        *,
        timeout: float | None = None,
        call_timeout: float | None = None,
        owner: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> CallOptions:
        """Settings for single calls, apart from the function's own keywords.

        ``timeout``: seconds to wait for a worker; ``call_timeout``: seconds the call may run;
        what is left out is as the manager has it. ``on_progress``: called with each value that the
        function gives ``leasepool_django.worker.report_progress``, before the outcome is there: on
        the event loop, or on the thread that waits (with ``thread``: that of the function).
        ``await manager.options(timeout=1).run(fn, …)``.
        """
        return CallOptions(lambda: self._calls, timeout, call_timeout, owner, on_progress)

    # -- leases ------------------------------------------------------------------------------------

    async def acquire(
        self,
        *,
        owner: str | None = None,
        lease_seconds: float | None = None,
        wait: bool = True,
        timeout: float | None = None,
        workers: int | None = None,
    ) -> ExecutorLease:
        """Lease ``workers`` workers of one pool (default: a whole pool), first come first served.

        ``owner``: free text for logs and status; ``lease_seconds``: seconds until it expires
        (``math.inf``: never); ``wait=False``: ``LeaseUnavailableError`` at once when none is free;
        ``timeout``: seconds to wait before ``LeaseTimeoutError`` (default: ``acquire_timeout``).
        """
        return await self._calls.acquire(owner, lease_seconds, timeout, workers, wait=wait)

    def acquire_sync(
        self,
        *,
        owner: str | None = None,
        lease_seconds: float | None = None,
        wait: bool = True,
        timeout: float | None = None,
        workers: int | None = None,
    ) -> ExecutorLease:
        """``acquire`` for blocking code."""
        return self._calls.acquire_sync(owner, lease_seconds, timeout, workers, wait=wait)

    @contextlib.asynccontextmanager
    async def lease(
        self,
        *,
        owner: str | None = None,
        lease_seconds: float | None = None,
        wait: bool = True,
        timeout: float | None = None,
        workers: int | None = None,
    ) -> AsyncIterator[ExecutorLease]:
        """``async with manager.lease(…) as lease``: ``acquire`` and release in one."""
        async with await self.acquire(
            owner=owner, lease_seconds=lease_seconds, wait=wait, timeout=timeout, workers=workers
        ) as lease:
            yield lease

    @contextlib.contextmanager
    def lease_sync(
        self,
        *,
        owner: str | None = None,
        lease_seconds: float | None = None,
        wait: bool = True,
        timeout: float | None = None,
        workers: int | None = None,
    ) -> Iterator[ExecutorLease]:
        """``with manager.lease_sync(…) as lease``: ``acquire_sync`` and release in one."""
        with self.acquire_sync(
            owner=owner, lease_seconds=lease_seconds, wait=wait, timeout=timeout, workers=workers
        ) as lease:
            yield lease

    # -- looking -----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The ``name_prefix``: what log lines, threads and lease ids begin with."""
        return self._config.name_prefix

    @property
    def backend(self) -> str:
        """The backend's name."""
        return self._backend.name

    @property
    def started(self) -> bool:
        """Whether the manager takes calls."""
        return self._dispatcher.closed is None

    @property
    def max_pools(self) -> int:
        """The most pools there may be."""
        return self._config.max_pools

    @property
    def workers_per_pool(self) -> int:
        """How many workers a pool has."""
        return self._config.workers_per_pool

    @property
    def total_count(self) -> int:
        """How many pools there are."""
        return self._supervisor.pool_counts()[0]

    @property
    def leased_count(self) -> int:
        """How many pools have a worker that is leased or runs a call."""
        return self._supervisor.pool_counts()[1]

    @property
    def available_count(self) -> int:
        """How many pools are wholly free."""
        total, leased = self._supervisor.pool_counts()
        return total - leased

    def desired_executor_count(self) -> int:
        """How many pools the sizing rule asks for now; calls ``size_provider``."""
        return self._supervisor.desired_pools()

    def notify_scale_changed(self) -> None:
        """Look at the sizing rule now instead of at the next ``check_interval``."""
        self._supervisor.check_size()

    def estimated_wait(self) -> float:
        """Seconds a new caller may expect to wait, from the line and recent call times."""
        return self._dispatcher.estimated_wait()

    def subscribe(
        self, subscriber: Callable[[Event], None], *, wants: Callable[[str], bool] | None = None
    ) -> None:
        """Call ``subscriber`` with every ``Event`` from now on, on the notifier's thread.

        ``wants(kind)`` tells whether it wants events of a kind at present; it must be quick, and
        what nobody wants is not made.
        """
        self._subscribers.append(Subscriber(subscriber, wants or (lambda _: True)))

    @property
    def state(self) -> str:
        """New, starting, running, stopping or stopped; as in ``stats()``."""
        return self._supervisor.state

    def stats(self) -> ManagerStats:
        """A frozen snapshot of pools, leases, line and totals."""
        return self._supervisor.stats()

    def describe(self) -> str:
        """The state in one line, for logs and people."""
        stats = self.stats()
        return (
            f"{stats.name} ({stats.backend}, {stats.state}): {len(stats.pools)} of "
            f"{stats.max_pools} pools, {stats.idle_workers} idle and {stats.busy_workers} busy "
            f"workers, {len(stats.leases)} leases, {stats.waiting} waiting"
        )

    def __repr__(self) -> str:
        return f"<LeasedExecutorManager {self.describe()}>"

    # -- forks -------------------------------------------------------------------------------------

    def forget_after_fork(self) -> None:
        """In a forked child: forget the parent's workers, touching neither locks nor sockets."""
        self._supervisor.discard()
        self._set_up()


def _after_fork_in_child() -> None:
    for manager in list(_live):
        manager.forget_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
