"""What takes time happens elsewhere than on the event loop, or in short steps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import LeasedExecutorManager
from leasepool_django.backends.process import driver, shared
from leasepool_django.backends.process.driver import ProcessWorker
from leasepool_django.backends.process.encoding import Encoder
from leasepool_django.backends.process.pool import ProcessBackend
from leasepool_django.backends.process.shared import Payload, Segment
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import new_manager, running
from tests.shared_jobs import shared_memory_in_use
from tests.waiting import async_wait_until

# What growing, respawning, killing and shrinking come to, and how the end of a process is met.
STEPS: tuple[tuple[type, str], ...] = (
    (ProcessBackend, "start_worker"),
    (ProcessWorker, "started"),
    (ProcessBackend, "ending"),
    (ProcessWorker, "retire"),
    (ProcessWorker, "ended"),
)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """The threads on which each of the steps was taken."""
    seen: dict[str, set[int]] = defaultdict(set)

    def spy_on(owner: type, name: str) -> None:
        step = getattr(owner, name)

        @wraps(step)
        def spied(*args: Any, **kwargs: Any) -> Any:
            seen[name].add(threading.get_ident())
            return step(*args, **kwargs)

        monkeypatch.setattr(owner, name, spied)

    for owner, name in STEPS:
        spy_on(owner, name)
    return seen


def test_pools_grow_and_shrink_and_workers_are_killed_and_replaced_elsewhere(
    threads: dict[str, set[int]], loop_runner: LoopRunner, tmp_path: Path
) -> None:
    async def live(manager: LeasedExecutorManager) -> int:
        await manager.start()
        leases = [await manager.acquire() for _ in range(3)]
        for lease in leases:
            await lease.release()
        manager.notify_scale_changed()
        await async_wait_until(lambda: manager.total_count == 1)
        spinning = asyncio.create_task(manager.run(jobs.spin, tmp_path / "spinning"))
        await async_wait_until((tmp_path / "spinning").exists)
        spinning.cancel()
        assert await manager.run(jobs.echo, 1) == 1
        await manager.stop()
        return threading.get_ident()

    here = loop_runner(live(new_manager(max_pools=3, check_interval=600)))
    assert set(threads) == {name for _, name in STEPS}
    assert all(here not in where for where in threads.values())


async def longest_turn(work: asyncio.Task[Any]) -> float:
    """Seconds of the longest turn of the loop until ``work`` is done."""
    longest = 0.0
    before = time.perf_counter()
    while not work.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    return longest


@pytest.mark.skipif(not shared.AVAILABLE, reason="needs memfd_create (Linux)")
@pytest.mark.parametrize("end", ["a cancelled call", "time"])
def test_large_memory_is_given_up_elsewhere(
    end: str, loop_runner: LoopRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed: list[tuple[int, int]] = []
    close = Segment.close

    def spied(segment: Segment) -> None:
        closed.append((segment.size, threading.get_ident()))
        close(segment)

    monkeypatch.setattr(Segment, "close", spied)
    monkeypatch.setattr(driver, "KEEP_SECONDS", 0.2)
    size = 50_000_000

    async def live(manager: LeasedExecutorManager) -> int:
        await manager.start()
        value = bytes(size)
        if end == "time":
            assert await manager.run(len, value) == size
        else:
            spinning = asyncio.create_task(manager.run(jobs.spin_with, tmp_path / "on", value))
            await async_wait_until((tmp_path / "on").exists)
            spinning.cancel()
            assert await manager.run(len, b"") == 0
        await async_wait_until(lambda: shared_memory_in_use() == 0)
        await manager.stop()
        return threading.get_ident()

    here = loop_runner(live(new_manager()))
    [(of_size, where)] = closed
    assert of_size >= size
    assert where != here


@pytest.mark.skipif(not shared.AVAILABLE, reason="needs memfd_create (Linux)")
def test_no_turn_of_the_loop_takes_as_long_as_writing_a_large_argument(
    loop_runner: LoopRunner,
) -> None:
    """Sixteen megabytes at a time are written; the shortest of several trials, as both are."""
    value = bytes(200_000_000)
    payload = Encoder(None, ()).encode(len, (value,), {})
    assert isinstance(payload, Payload)

    def write_at_once() -> float:
        segment = Segment.create(payload.size)
        begin = time.perf_counter()
        segment.write(payload)
        taken = time.perf_counter() - begin
        segment.close()
        return taken

    async def send() -> float:
        task = asyncio.create_task(manager.run(len, value))
        longest = await longest_turn(task)
        assert await task == len(value)
        return longest

    turns = []
    for _ in range(4):  # each time into memory that nobody has used before
        with running() as manager:
            turns.append(loop_runner(send()))
    assert min(turns) < min(write_at_once() for _ in range(3)) / 2
