"""Leasing and running calls, with no Django inside.

One call, from ``await manager.run(fn, x)`` to its result, when a worker is idle::

    caller (its own loop)            Dispatcher (one lock)        worker process
      encode fn, x
      begin(call) ----------------->  idle slot? take it
      worker.begin(call) -- frame to the worker alone ---------->  fn(x)
      await call.future                                              |
      reader callback <----------------- outcome frame -------------+
        call_ended(call) ---------->  next in line? else idle
        (begins the next call here)
        decode, set the future

When none is idle, the call joins the line, encoded; the reader callback that frees a worker hands
it its next call. A caller on another loop, or a blocking one, is told on its own thread and drives
the worker from there. Short calls may be sent to a busy worker ahead of their turn; they wait in
line until it has finished the one before, and can be taken back.

Who owns what:

* ``LeasedExecutorManager`` (manager): the public face; any thread, any loop.
* ``Dispatcher`` (dispatcher): who has which worker. Its lock guards the line, the slots, the
  leases and every waiter's state; it is held briefly, and no user code runs under it.
* ``Line`` (line): the first-in-first-out order and the idle slots; no lock of its own.
* ``SendingAhead`` (ahead): the calls that lie at a busy worker; under the same lock.
* ``Supervisor`` (supervisor): starts, replaces, sizes and ends; runs on the housekeeper's thread.
* ``Housekeeper`` (housekeeper): the thread; descriptors, timers, deadlines. No user code.
* ``Notifier`` (events): the thread for user code: log handlers, subscribers, ``size_provider``.
* a worker's pipes and socket: whoever holds the slot drives them, on one thread at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import ExecutorBackend, ProcessLoggingConfig
from .events import Event
from .lease import ExecutorLease
from .manager import LeasedExecutorManager
from .supervisor import AT_REST

if TYPE_CHECKING:
    from .stats import LeaseStats, ManagerStats, PoolStats, WorkerStats

__all__ = [
    "AT_REST",
    "Event",
    "ExecutorBackend",
    "ExecutorLease",
    "LeaseStats",
    "LeasedExecutorManager",
    "ManagerStats",
    "PoolStats",
    "ProcessLoggingConfig",
    "WorkerStats",
]


def __getattr__(name: str) -> Any:
    # Not with the package: to make its classes takes as long as to import the rest.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import stats

    return getattr(stats, name)
