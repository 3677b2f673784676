"""Every error this package raises on its own account, for callers to catch by name.

Settings mistakes are Django's ``ImproperlyConfigured`` and are raised in ``conf``; everything that
goes wrong while leasing or running a call is here, below ``LeasePoolError``. Each error's text says
what happened and what to do; the facts in it are attributes too. All of them survive pickling.
"""

from __future__ import annotations

from concurrent.futures import BrokenExecutor
from typing import Any

__all__ = [
    "CallTimeoutError",
    "LeaseExpiredError",
    "LeasePoolError",
    "LeasePoolNotStartedError",
    "LeaseReleasedError",
    "LeaseTimeoutError",
    "LeaseUnavailableError",
    "NotPicklableError",
    "RemoteError",
    "UnknownAliasError",
    "UnsupportedBackendError",
    "WorkerCrashedError",
    "WorkerStartError",
]


class LeasePoolError(Exception):
    """Base of all errors of this package.

    ``facts`` given by keyword become attributes of the error; a fact that a class documents and
    that was not given is ``None``.
    """

    def __init__(self, message: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.__dict__.update(facts)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, dict(self.__dict__)))


def _rebuild(
    cls: type[LeasePoolError], args: tuple[Any, ...], facts: dict[str, Any]
) -> LeasePoolError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class LeasePoolNotStartedError(LeasePoolError):
    """The manager is not running: ``start()`` was not awaited, or it has been stopped."""


class LeaseUnavailableError(LeasePoolError):
    """No lease can be had now.

    ``waiting``: how many callers stood in line; ``retry_after``: estimated seconds until a worker
    is free, for a ``Retry-After`` header; ``waits_for_itself``: the caller holds what it asks for,
    so that trying again is in vain.
    """

    waiting: int | None = None
    retry_after: float | None = None
    waits_for_itself: bool = False


class LeaseTimeoutError(LeaseUnavailableError, TimeoutError):
    """No lease came within the time the caller was willing to wait. ``waited``: seconds."""

    waited: float | None = None


class LeaseExpiredError(LeasePoolError):
    """The lease passed its hard expiry and was revoked; calls that still ran were stopped."""

    lease_id: str | None = None
    owner: str | None = None


class LeaseReleasedError(LeaseExpiredError):
    """The lease was given back; it takes no new calls."""


class RemoteError(LeasePoolError):
    """Stands for an exception of the function that cannot arrive as itself.

    ``type_name``: the dotted name of the exception's class in the worker; ``text``: its message;
    ``traceback_text``: the worker's formatted traceback.
    """

    type_name: str | None = None
    text: str | None = None
    traceback_text: str | None = None


class CallTimeoutError(LeasePoolError, TimeoutError):
    """The call ran longer than its ``call_timeout`` and was stopped.

    ``timeout``: the limit in seconds; ``function``: the function's name.
    """

    timeout: float | None = None
    function: str | None = None


class WorkerCrashedError(LeasePoolError, BrokenExecutor):
    """The worker died while it ran this call. It has been replaced; no other call is affected.

    ``pid``; ``exitcode`` (``None`` when killed by a signal or unknown); ``signal_name`` (such as
    ``"SIGKILL"``); ``function``: the function's name.
    """

    pid: int | None = None
    exitcode: int | None = None
    signal_name: str | None = None
    function: str | None = None


class WorkerStartError(LeasePoolError, BrokenExecutor):
    """A worker could not be started. ``traceback_text``: what happened in it, where known."""

    traceback_text: str | None = None


class NotPicklableError(LeasePoolError, TypeError):
    """The function, an argument or a result cannot travel between processes.

    ``path``: where the culprit is, such as ``kwargs['client'].pool``; ``type_name``: its type.
    """

    path: str | None = None
    type_name: str | None = None


class UnknownAliasError(LeasePoolError, KeyError):
    """``settings.LEASEPOOL`` has no such alias. ``alias``: the one that was asked for."""

    alias: str | None = None

    def __str__(self) -> str:
        # KeyError shows the repr of its argument.
        return Exception.__str__(self)


class UnsupportedBackendError(LeasePoolError):
    """This backend, or what was asked of it, does not exist on this platform."""
