"""Segments are closed once, elsewhere while that is possible, and never too many at a time."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leasepool_django.backends.process import closing, shared
from leasepool_django.backends.process.closing import Closer
from leasepool_django.backends.process.driver import ProcessWorker
from leasepool_django.backends.process.shared import Segment
from tests import process_jobs as jobs
from tests.process_pools import run_program, running
from tests.shared_jobs import shared_memory_in_use
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not shared.AVAILABLE, reason="needs memfd_create (Linux)")

LARGE = closing.CLOSED_HERE


def is_open(segment: Segment) -> bool:
    return segment.fd >= 0


@pytest.fixture
def jobs_elsewhere() -> list[Callable[[], None]]:
    """What another thread would run."""
    return []


@pytest.fixture
def closer(jobs_elsewhere: list[Callable[[], None]]) -> Iterator[Closer]:
    closer = Closer()
    closer.open(jobs_elsewhere.append)
    yield closer
    closer.close()


def test_only_what_is_large_is_closed_elsewhere(
    closer: Closer, jobs_elsewhere: list[Callable[[], None]]
) -> None:
    small, large = Segment.create(LARGE // 2), Segment.create(LARGE)
    closer.let_go(small)
    closer.let_go(large)
    assert (is_open(small), is_open(large)) == (False, True)
    [job] = jobs_elsewhere
    job()
    assert not is_open(large)


def test_what_waits_is_bounded(
    closer: Closer,
    jobs_elsewhere: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A single segment may be larger; as nothing is written here, none of them has memory."""
    monkeypatch.setattr(closing, "MOST_WAITING", 2 * LARGE)
    segments = [Segment.create(4 * LARGE), *(Segment.create(LARGE) for _ in range(4))]
    closer.let_go(segments[0])
    closer.let_go(segments[1])
    assert [is_open(segment) for segment in segments] == [True, False, True, True, True]
    jobs_elsewhere.pop()()
    for segment in segments[2:]:
        closer.let_go(segment)
    assert [is_open(segment) for segment in segments] == [False, False, True, True, False]


def test_when_there_is_no_other_thread_any_more_nothing_waits(
    closer: Closer, jobs_elsewhere: list[Callable[[], None]]
) -> None:
    before, after = Segment.create(LARGE), Segment.create(LARGE)
    closer.let_go(before)
    closer.close()
    closer.let_go(after)
    assert not is_open(before)
    assert not is_open(after)
    jobs_elsewhere.pop()()  # late, and with nothing to do


def test_a_worker_that_nobody_waits_for_is_let_go_of_without_the_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its loop was closed before it could: its socket and its memory go with the last reference."""
    workers: list[weakref.ref[ProcessWorker]] = []
    started = ProcessWorker.started

    def spied(worker: ProcessWorker, pid: int, pidfd: int | None) -> None:
        workers.append(weakref.ref(worker))
        started(worker, pid, pidfd)

    monkeypatch.setattr(ProcessWorker, "started", spied)

    async def call() -> int:
        assert await manager.run(len, bytes(2 * LARGE)) == 2 * LARGE
        return await manager.run(os.getpid)

    gc.collect()
    gc.disable()
    try:
        with running() as manager:
            loop = asyncio.new_event_loop()
            os.kill(loop.run_until_complete(call()), 9)
            first = workers[0]
            wait_until(lambda: manager.stats().workers_crashed == 1)
            loop.close()
            del loop
            assert manager.run_sync(jobs.echo, 1) == 1
            wait_until(lambda: first() is None and shared_memory_in_use() == 0)
    finally:
        gc.enable()


FORKING = """
    import os, threading
    import numpy as np
    from leasepool_django import LeasedExecutorManager
    from leasepool_django.backends.process.shared import Segment
    from tests import shared_jobs as jobs

    if __name__ == "__main__":
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
        manager.start_sync()
        closing, go_on = threading.Event(), threading.Event()
        close = Segment.close

        def slow(segment):
            if segment.size > 20_000_000 and os.getpid() == server:
                closing.set()
                go_on.wait(20)
            close(segment)

        server = os.getpid()
        Segment.close = slow
        # The function keeps them: both segments are given up, one is being closed and one waits.
        manager.run_sync(jobs.keep, np.ones(4_000_000))
        assert closing.wait(20)
        manager.run_sync(jobs.keep, np.ones(4_000_000))
        child = os.fork()
        if not child:
            os._exit(jobs.shared_memory_in_use() + jobs.shared_descriptors())
        status = os.waitpid(child, 0)[1]
        go_on.set()
        manager.stop_sync()
        print(status, jobs.shared_memory_in_use(), jobs.shared_descriptors())
"""


def test_a_fork_of_the_server_keeps_nothing_of_what_is_being_closed(tmp_path: Path) -> None:
    ended = run_program(tmp_path, FORKING)
    assert ended.stdout == "0 0 0\n", ended.stderr
