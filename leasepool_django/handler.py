"""``pools``: alias → manager, one per process for all threads, tasks and event loops.

The whole package gets its managers here. One starts at its first use, or with all others in
``start_all``; what runs is stopped by ``stop_all``, or at exit. ``AppConfig.ready`` must never
start one: workers run it too.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from . import signals
from .conf import SETTING, AliasConfig, get_config
from .engine import LeasedExecutorManager
from .exceptions import (
    LeasePoolError,
    LeasePoolNotStartedError,
    UnknownAliasError,
    UnsupportedBackendError,
)
from .presence import Presence
from .worker import in_inline_call, in_worker

__all__ = ["AliasManager", "Pools", "pools"]


class AliasManager(LeasedExecutorManager):
    """The manager of one alias, which starts when it is first used."""

    def __init__(self, owner: Pools, config: AliasConfig) -> None:
        super().__init__(**config.manager_kwargs())
        self.alias = config.alias
        self.publishes_status = config.publish_status
        self.subscribe(partial(signals.send, type(self), self.alias), wants=signals.wanted)
        self._owner = owner

    def stop_within_grace(self) -> None:
        """Let all go on for ``SHUTDOWN_GRACE_SECONDS``, then stop; returns at once."""
        self.request_stop(grace=0, after=self._config.shutdown_grace_seconds)

    async def start(self) -> None:
        """See ``LeasedExecutorManager``; ``manage.py leasepool status`` shows it from now on."""
        with self._owner.presence.while_starting(self):
            await super().start()

    def start_sync(self) -> None:
        """``start`` for blocking code."""
        with self._owner.presence.while_starting(self):
            super().start_sync()

    async def stop(self, *, grace: float | None = None) -> None:
        """See ``LeasedExecutorManager``."""
        try:
            await super().stop(grace=grace)
        finally:
            self._owner.presence.settle()

    def stop_sync(self, *, grace: float | None = None) -> None:
        """``stop`` for blocking code."""
        try:
            super().stop_sync(grace=grace)
        finally:
            self._owner.presence.settle()

    async def ensure_running(self) -> None:
        """Start; called by the engine when work is asked for and nothing runs."""
        self._owner.require_in_service(self)
        await self.start()
        try:
            self._owner.require_in_service(self)
        except LeasePoolNotStartedError:
            await self.stop(grace=0)  # who took it out of service could not see it running
            raise

    def ensure_running_sync(self) -> None:
        """``ensure_running`` for blocking callers."""
        self._owner.require_in_service(self)
        self.start_sync()
        try:
            self._owner.require_in_service(self)
        except LeasePoolNotStartedError:
            self.stop_sync(grace=0)
            raise


class Pools(Mapping[str, AliasManager]):
    """Alias → manager. Looking an alias up starts nothing.

    After ``stop_all`` or ``request_stop`` the managers refuse to start until the next ``start_all``
    or ``reset``: a server that is shutting down must not start workers for its last requests.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The next four are guarded by _lock; request_stop sets _closed without it.
        self._managers: dict[str, AliasManager] | None = None
        self._generation = 0  # raised by reset: what was read from the settings before is old
        self._closed = False
        self._registered = False
        self.presence = Presence(self.existing)

    def __getitem__(self, alias: str) -> AliasManager:
        managers = self._all()
        try:
            return managers[alias]
        except KeyError:
            known = ", ".join(repr(name) for name in managers)
            raise UnknownAliasError(
                f"There is no pool alias {alias!r}. settings.{SETTING} has {known}.", alias=alias
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    # A mapping compares by content and has no hash; this one is a service that others refer to.

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __repr__(self) -> str:
        managers = self._managers
        if managers is None:
            return f"<{type(self).__name__}: not configured yet>"
        running = [alias for alias, manager in managers.items() if manager.started]
        return f"<{type(self).__name__}: {', '.join(managers)}; running: {', '.join(running)}>"

    @property
    def closed(self) -> bool:
        """Whether the managers refuse to start, because the server shuts down."""
        return self._closed

    def existing(self) -> list[AliasManager]:
        """The managers made so far; without any, neither reads the settings nor makes them."""
        return list((self._managers or {}).values())

    async def start_all(self) -> None:
        """Start every alias; returns when the first worker of each ``MIN_POOLS`` pool is ready.

        If one cannot start, or the caller is cancelled, the others are stopped and the error of
        the first that failed is raised, with the others' as notes. The next use tries again.
        """
        managers = self._reopen()
        try:
            results = await asyncio.gather(
                *(manager.ensure_running() for manager in managers), return_exceptions=True
            )
        except asyncio.CancelledError:
            self._stop(managers, 0)
            raise
        error = _joined(managers, results)
        if error is not None:
            # Not closed: no server shuts down, and the next use may find the reason gone.
            await self._stop_async(managers, 0)
            raise error

    def start_all_sync(self) -> None:
        """``start_all`` for blocking code."""
        managers = self._reopen()
        with ThreadPoolExecutor(len(managers), "leasepool-start") as executor:
            starts = [executor.submit(manager.ensure_running_sync) for manager in managers]
        error = _joined(managers, [start.exception() for start in starts])
        if error is not None:
            self._stop(managers, 0)
            raise error

    async def stop_all(self, *, grace: float | None = None) -> None:
        """Stop every manager; running calls get ``grace`` seconds to finish.

        ``None``: each alias's ``SHUTDOWN_GRACE_SECONDS``. Returns when the workers are gone.
        """
        await self._stop_async(self._close(), grace)

    def stop_all_sync(self, *, grace: float | None = None) -> None:
        """``stop_all`` for blocking code; needs neither an event loop nor a new thread."""
        self._stop(self._close(), grace)

    def request_stop(self) -> None:
        """Begin to stop every manager, and return at once. Allowed in a signal handler.

        Running calls get each alias's ``SHUTDOWN_GRACE_SECONDS``, who waits in a line is refused.
        """
        # Without the lock, which the interrupted thread may hold.
        self._closed = True
        for manager in self.existing():
            manager.request_stop()

    def reset(self) -> None:
        """Stop everything at once and forget the configuration; the next use reads it anew."""
        with self._lock:
            managers, self._managers = self._managers, None
            self._generation += 1
            self._closed = False
        self._stop(list((managers or {}).values()), 0)

    def require_in_service(self, manager: AliasManager) -> None:
        """Raise ``LeasePoolNotStartedError`` if ``manager`` must not start (again)."""
        _refuse_in_worker()
        with self._lock:
            if self._managers is None or self._managers.get(manager.alias) is not manager:
                raise LeasePoolNotStartedError(
                    f"This manager of the alias {manager.alias!r} is out of service: the pools "
                    f"were reset. Use pools[{manager.alias!r}], which gives the current one."
                )
            if self._closed:
                raise LeasePoolNotStartedError(
                    f"The pool {manager.alias!r} takes no more work: the server is shutting down "
                    "(pools.stop_all() or pools.request_stop() was called). pools.start_all() "
                    "opens it again."
                )

    def _all(self) -> dict[str, AliasManager]:
        _refuse_in_worker()
        while True:
            generation = self._generation
            managers = self._managers
            if managers is not None:
                return managers
            # Outside the lock, since it imports user code. A manager costs nothing until it starts.
            managers = {alias: self._create(config) for alias, config in get_config().items()}
            with self._lock:
                if self._managers is None and self._generation == generation:
                    self._managers = managers
                    self._register()
                # Otherwise another thread was first, or the settings were changed meanwhile.

    def _create(self, config: AliasConfig) -> AliasManager:
        try:
            return AliasManager(self, config)
        except (ImportError, TypeError, ValueError, UnsupportedBackendError) as error:
            raise ImproperlyConfigured(f"{SETTING}[{config.alias!r}]: {error}") from error

    def _register(self) -> None:
        if not self._registered:
            self._registered = True
            atexit.register(self._stop_at_exit)
            _before_threads_are_joined(self._limit_exit)
            if hasattr(os, "register_at_fork"):  # not on Windows
                os.register_at_fork(after_in_child=self._after_fork)

    def _reopen(self) -> list[AliasManager]:
        managers = self._all()
        with self._lock:
            self._closed = False
        return list(managers.values())

    def _close(self) -> list[AliasManager]:
        with self._lock:
            self._closed = True
            return self.existing()

    async def _stop_async(self, managers: list[AliasManager], grace: float | None) -> None:
        results = await asyncio.gather(
            *(manager.stop(grace=grace) for manager in managers), return_exceptions=True
        )
        error = _joined(managers, results)
        if error is not None:
            raise error

    def _stop(self, managers: list[AliasManager], grace: float | None) -> None:
        # All begin before one is waited for: the graces run together, and no line takes callers.
        for manager in managers:
            _outcome(partial(manager.request_stop, grace=grace))  # stop_sync meets it again
        results = [_outcome(partial(manager.stop_sync, grace=grace)) for manager in managers]
        error = _joined(managers, results)
        if error is not None:
            raise error

    def _limit_exit(self) -> None:
        reloading = _runserver_reloads()
        if reloading:
            self._closed = True
        for manager in self.existing():
            if reloading:
                manager.request_stop(grace=0)
            else:
                manager.stop_within_grace()

    def _stop_at_exit(self) -> None:
        self.stop_all_sync(grace=0)

    def _after_fork(self) -> None:
        # The lock may be held by a thread that does not exist here. The engine has set the
        # managers up anew, without workers.
        self._lock = threading.Lock()
        self._closed = False
        self.presence.forget()


def _before_threads_are_joined(function: Callable[[], None]) -> None:
    """Call ``function`` when the interpreter begins to exit.

    ``atexit`` comes when all threads but daemons have ended, and those of an executor, such as
    asgiref's, may be waiting for a call. What they wait for would hold up the exit, and a reload
    with it, for as long as it takes.
    """
    # private: concurrent.futures uses it in the same way, and registered earlier, so runs later.
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        try:
            register(function)
        except RuntimeError:
            return  # the exit has begun already


def _runserver_reloads() -> bool:
    """Whether this process ends for ``runserver`` to start another one with changed files.

    Its requests end with it, so nobody is left to wait for calls; and until it has ended, it goes
    on to answer requests, by old code and without the executors of async views.
    """
    # Django's reloader leaves the main thread to itself, and runs the server on this one. It tells
    # the environment, too, which other processes inherit.
    return any(thread.name == "django-main-thread" for thread in threading.enumerate())


def _refuse_in_worker() -> None:
    if in_worker() or in_inline_call():
        raise LeasePoolError(
            f"Pools cannot be used inside a worker (process {os.getpid()}): a call that waits for "
            "another worker can wait for itself. Call the function directly, or make both calls "
            "from the server, a command or a test. If AppConfig.ready() did it, which workers run "
            "too, do it at the first use instead. If a worker came here by importing your script, "
            "put the script's code under `if __name__ == '__main__':`."
        )


def _outcome(step: Callable[[], None]) -> BaseException | None:
    """Run ``step`` and return what it raised, so that the next steps are taken anyway."""
    try:
        step()
    except Exception as error:  # noqa: BLE001 - the caller raises it when all steps are done
        return error
    return None


def _joined(
    managers: Sequence[AliasManager], results: Sequence[BaseException | None]
) -> BaseException | None:
    """Return the first error of ``results``, the others' texts added to it as notes."""
    failed = [(m, error) for m, error in zip(managers, results, strict=True) if error is not None]
    if not failed:
        return None
    first = failed[0][1]
    for manager, error in failed[1:]:
        first.add_note(f"{manager.alias!r} failed as well: {type(error).__name__}: {error}")
    return first


pools = Pools()


def reset_when_settings_change(*, setting: str, **_: object) -> None:
    """Receive ``setting_changed``: tests that override the setting get pools to match."""
    if setting == SETTING:
        pools.reset()


setting_changed.connect(reset_when_settings_change, dispatch_uid=f"{__name__}.reset")
