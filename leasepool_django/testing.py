"""For tests of projects that use pools: assertions that nothing is left behind.

They serve unittest and pytest alike; the fixture for pytest is in ``pytest_plugin``. Which database
and mail backend workers use during a test run is seen to by ``backends.process.django_testing``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

from .engine import LeasedExecutorManager, ManagerStats
from .handler import pools

__all__ = ["assert_no_leases", "assert_no_workers"]

PAUSE = 0.01  # seconds between two looks


def assert_no_leases(*managers: LeasedExecutorManager, timeout: float = 5.0) -> None:
    """Raise ``AssertionError`` if a lease is held, or a call runs or waits.

    ``managers``: which to look at; without any, those of all aliases that were used so far. What is
    on its way back, such as the worker of a call that was cancelled, gets ``timeout`` seconds.
    Starts nothing, and does not read the settings.
    """
    __tracebackhide__ = True
    _assert_none(managers, _work, "A test has left work in a pool", timeout)


def assert_no_workers(*managers: LeasedExecutorManager, timeout: float = 5.0) -> None:
    """Raise ``AssertionError`` if a manager has workers, as it has until it is stopped.

    ``managers`` and ``timeout`` as for ``assert_no_leases``.
    """
    __tracebackhide__ = True
    _assert_none(managers, _workers, "A test has left workers", timeout)


def _assert_none(
    managers: tuple[LeasedExecutorManager, ...],
    look: Callable[[ManagerStats], Iterator[str]],
    summary: str,
    timeout: float,
) -> None:
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    collected = False
    while True:
        over = time.monotonic() >= deadline
        found = [
            f"{stats.name}: {text}"
            for stats in [manager.stats() for manager in managers or pools.existing()]
            for text in look(stats)
        ]
        if not found:
            return
        if over:
            listed = "\n".join(f"- {text}" for text in found)
            raise AssertionError(f"{summary}:\n{listed}")
        if not collected:
            gc.collect()  # a lease that nobody has is returned by its finalizer
            collected = True
        time.sleep(PAUSE)


def _work(stats: ManagerStats) -> Iterator[str]:
    for lease in stats.leases:
        yield (
            f"lease {lease.lease_id} of {lease.workers} worker(s), owner {lease.owner!r}, has been "
            f"held for {lease.age:.1f} s. Use `async with` or `with`, or release it."
        )
    for worker in (worker for pool in stats.pools for worker in pool.workers):
        if worker.function is not None:
            yield (
                f"{worker.function} still runs (process {worker.pid}, owner {worker.owner!r}). "
                "Await it, or cancel the task that does."
            )
    if stats.waiting:
        yield f"{stats.waiting} caller(s) wait in line, the first for {stats.longest_wait:.1f} s."


def _workers(stats: ManagerStats) -> Iterator[str]:
    workers = [worker for pool in stats.pools for worker in pool.workers]
    processes = sorted({worker.pid for worker in workers if worker.pid is not None})
    if workers or stats.live_workers:
        yield (
            f"{max(len(workers), stats.live_workers)} worker(s) of the {stats.state} manager"
            f"{f', processes {processes}' if processes else ''}. Stop it: pools.reset(), or stop()."
        )
