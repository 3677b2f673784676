"""Managers of any backend for tests: started with all workers ready, and stopped afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from leasepool_django import LeasedExecutorManager
from tests.waiting import wait_until

__all__ = ["new_manager", "noted_warnings", "running", "wait_all_idle"]


def new_manager(workers: int = 1, **options: Any) -> LeasedExecutorManager:
    """Make a manager of one pool of ``workers`` threads, if ``options`` say nothing else."""
    options = {"backend": "thread", "max_pools": 1, **options}
    return LeasedExecutorManager(workers_per_pool=workers, **options)


@contextmanager
def running(workers: int = 1, **options: Any) -> Iterator[LeasedExecutorManager]:
    """Give a started manager with all of its workers ready, and stop it afterwards."""
    manager = new_manager(workers, **options)
    manager.start_sync()
    try:
        wait_all_idle(manager)
        yield manager
    finally:
        manager.stop_sync(grace=0)


def wait_all_idle(manager: LeasedExecutorManager) -> None:
    """Wait until every worker of every pool is ready and free."""
    wait_until(
        lambda: manager.stats().idle_workers == manager.total_count * manager.workers_per_pool,
        message=lambda: f"workers are missing: {manager.stats()}",
    )


@contextmanager
def noted_warnings() -> Iterator[list[str]]:
    """Give a list that every ``ResourceWarning`` of any thread is added to, as text."""
    noted: list[str] = []

    def note(message: Warning | str, category: type[Warning], *_args: object, **_: object) -> None:
        assert category is ResourceWarning
        noted.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield noted
