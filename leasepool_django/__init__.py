"""Leased worker processes for CPU-heavy Python in Django.

The public names are imported when they are first used: every worker imports this package, and
most workers need nothing of it. Nothing here may import Django, the engine or any other module
of the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import ExecutorBackend, ExecutorLease, LeasedExecutorManager
    from .exceptions import (
        CallTimeoutError,
        LeaseExpiredError,
        LeasePoolError,
        LeasePoolNotStartedError,
        LeaseReleasedError,
        LeaseTimeoutError,
        LeaseUnavailableError,
        NotPicklableError,
        RemoteError,
        UnknownAliasError,
        UnsupportedBackendError,
        WorkerCrashedError,
        WorkerStartError,
    )
    from .handler import pools
    from .shortcuts import offload, run_in_pool, run_in_pool_sync, with_lease

__all__ = [
    "CallTimeoutError",
    "ExecutorBackend",
    "ExecutorLease",
    "LeaseExpiredError",
    "LeasePoolError",
    "LeasePoolNotStartedError",
    "LeaseReleasedError",
    "LeaseTimeoutError",
    "LeaseUnavailableError",
    "LeasedExecutorManager",
    "NotPicklableError",
    "RemoteError",
    "UnknownAliasError",
    "UnsupportedBackendError",
    "WorkerCrashedError",
    "WorkerStartError",
    "offload",
    "pools",
    "run_in_pool",
    "run_in_pool_sync",
    "with_lease",
]

_HOMES = {
    "ExecutorBackend": "engine",
    "ExecutorLease": "engine",
    "LeasedExecutorManager": "engine",
    "offload": "shortcuts",
    "pools": "handler",
    "run_in_pool": "shortcuts",
    "run_in_pool_sync": "shortcuts",
    "with_lease": "shortcuts",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES.get(name, 'exceptions')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
