"""One manager, many event loops and threads: order, cancellation, and loops that go away."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from leasepool_django import LeaseTimeoutError, LeaseUnavailableError
from leasepool_django.engine import dispatcher as dispatcher_module
from leasepool_django.engine import housekeeper as housekeeper_module
from tests import jobs
from tests.callers import every_kind_of_caller
from tests.conftest import LoopRunner
from tests.managers import running, wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until

pytest.importorskip("uvloop")


@pytest.fixture(params=["process", "thread"])
def backend(request: pytest.FixtureRequest) -> str:
    """Run the test with workers that event loops drive themselves, and with others."""
    return str(request.param)


# --- all at once ----------------------------------------------------------------------------------


def test_loops_and_threads_use_one_manager_at_once(backend: str) -> None:
    with running(3, backend=backend) as manager, every_kind_of_caller(manager) as callers:
        futures: list[Future[Any]] = []
        for number in range(40):
            futures += [ask(jobs.add, number, 1000) for ask in callers.values()]
        for number in range(40):
            for future in futures[number * len(callers) : (number + 1) * len(callers)]:
                assert future.result(timeout=30) == number + 1000
        stats = manager.stats()
        assert stats.calls_started == stats.calls_finished == len(futures)
        assert (stats.waiting, stats.idle_workers) == (0, 3)


def test_the_line_is_first_come_first_served_across_loops_and_threads(
    backend: str, stage: Stage
) -> None:
    with running(backend=backend) as manager, every_kind_of_caller(manager) as callers:
        first = callers["blocking"](jobs.hold, stage.folder, "first")
        stage.wait_begun("first")
        names, futures = ["first"], [first]
        for turn in range(3):
            for kind, ask in callers.items():
                names.append(f"{kind} {turn}")
                futures.append(ask(jobs.begin, stage.folder, names[-1]))
                wait_until(lambda: manager.stats().waiting == len(futures) - 1)
        stage.let_go()
        assert [future.result(timeout=30) for future in futures] == names
        assert stage.begun() == names


def test_who_releases_and_asks_again_goes_to_the_end_of_the_line(loop_runner: LoopRunner) -> None:
    order: list[str] = []

    async def greedy() -> None:
        for turn in range(3):
            async with manager.lease():
                order.append(f"greedy {turn}")
                if not turn:
                    await async_wait_until(lambda: manager.stats().waiting == 2)

    async def modest(name: str) -> None:
        async with manager.lease():
            order.append(name)

    async def main() -> None:
        tasks = [asyncio.create_task(greedy())]
        await async_wait_until(lambda: order)
        tasks += [asyncio.create_task(modest(name)) for name in "ab"]
        await asyncio.gather(*tasks)

    with running() as manager:
        loop_runner(main())
    assert order[:3] == ["greedy 0", "a", "b"]


def test_a_large_request_at_the_head_is_not_starved_by_small_ones(stage: Stage) -> None:
    """Those behind it wait, although there is room for them."""

    async def main() -> None:
        held = [asyncio.create_task(manager.run(jobs.hold, stage.folder, n)) for n in "ab"]
        await stage.wait_begun_async("a", "b")
        large = asyncio.create_task(manager.acquire())
        await async_wait_until(lambda: manager.stats().waiting == 1)
        small = asyncio.create_task(manager.run(jobs.begin, stage.folder, "small"))
        await async_wait_until(lambda: manager.stats().waiting == 2)
        stage.let_go("a")
        await held[0]
        await async_wait_until(lambda: manager.stats().idle_workers == 1)
        assert manager.stats().waiting == 2
        stage.let_go("b")
        lease = await large
        assert lease.workers == 2
        assert sorted(stage.begun()) == ["a", "b"]
        await lease.release()
        await asyncio.gather(small, *held)

    with running(2) as manager:
        asyncio.run(main())


def test_when_the_large_request_gives_up_those_behind_it_go_on(stage: Stage) -> None:
    async def main() -> None:
        held = asyncio.create_task(manager.run(jobs.hold, stage.folder, "held"))
        await stage.wait_begun_async("held")
        large = asyncio.create_task(manager.acquire())
        await async_wait_until(lambda: manager.stats().waiting == 1)
        small = asyncio.create_task(manager.run(jobs.add, 1))
        await async_wait_until(lambda: manager.stats().waiting == 2)
        large.cancel()
        assert await small == 1
        with pytest.raises(LeaseTimeoutError):
            await manager.acquire(timeout=0.01)
        stage.let_go()
        await held

    with running(2) as manager:
        asyncio.run(main())


# --- cancellation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(4))
def test_a_waiter_cancelled_around_its_grant_swallows_nothing(
    backend: str, loop_runner: LoopRunner, turns: int
) -> None:
    """Before the loop has picked the grant up, in the same turn, and after."""

    async def main() -> None:
        for wanted in ("lease", "call"):
            lease = await manager.acquire()
            waiter: asyncio.Future[Any]
            if wanted == "lease":
                waiter = asyncio.ensure_future(manager.acquire())
            else:
                waiter = asyncio.ensure_future(manager.run(jobs.add, 1))
            await async_wait_until(lambda: manager.stats().waiting == 1)
            await lease.release()
            for _ in range(turns):
                await asyncio.sleep(0)
            waiter.cancel()
            await asyncio.wait([waiter])
            if not waiter.cancelled() and wanted == "lease":
                await waiter.result().release()
            assert await manager.options(timeout=20).run(jobs.add, 2) == 2
        await async_wait_until(lambda: manager.stats().idle_workers == 1)

    with running(backend=backend) as manager:
        loop_runner(main())


def test_an_asyncio_timeout_ends_the_wait(loop_runner: LoopRunner) -> None:
    async def main() -> None:
        async with manager.lease():
            waiting = asyncio.create_task(manager.acquire())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(waiting, 0.02)
            assert manager.stats().waiting == 0

    with running() as manager:
        loop_runner(main())


class Interruption(BaseException):
    """Raised by a signal handler, as ``KeyboardInterrupt`` is."""


class Interrupter:
    """Raises ``Interruption`` in the main thread, once a condition holds there."""

    def __init__(self) -> None:
        self.armed = False

    def handle(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise Interruption

    def when(self, condition: Callable[[], object]) -> None:
        wait_until(condition)
        self.armed = True

        def delivered() -> bool:
            # Again if need be: one that comes just before the thread blocks is noticed only when
            # that ends (a limitation of Python's locks).
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            return not self.armed

        wait_until(delivered)


@pytest.fixture
def interrupter() -> Iterator[Interrupter]:
    interrupter = Interrupter()
    before = signal.signal(signal.SIGUSR1, interrupter.handle)
    yield interrupter
    signal.signal(signal.SIGUSR1, before)


def test_an_interrupted_blocking_caller_leaves_nothing_behind(
    backend: str, stage: Stage, interrupter: Interrupter
) -> None:
    with running(backend=backend) as manager, ThreadPoolExecutor() as threads:
        interrupting = threads.submit(interrupter.when, stage.begun)
        with pytest.raises(Interruption):
            manager.run_sync(jobs.hold, stage.folder, "running")
        interrupting.result()
        stage.let_go("running")
        other = threads.submit(manager.run_sync, jobs.hold, stage.folder, "other")
        stage.wait_begun("other")
        for wait in (manager.acquire_sync, lambda: manager.run_sync(jobs.add, 1)):
            interrupting = threads.submit(interrupter.when, lambda: manager.stats().waiting)
            with pytest.raises(Interruption):
                wait()
            interrupting.result()
            assert manager.stats().waiting == 0
        stage.let_go()
        assert other.result() == "other"
        wait_all_idle(manager)


# --- loops that go away ---------------------------------------------------------------------------


class Loop:
    """An event loop that runs only when the test says so."""

    def __init__(self, runner: LoopRunner) -> None:
        self.loop = runner.new_event_loop()
        self.tasks: list[asyncio.Task[Any]] = []

    def begin(self, coroutine: Coroutine[Any, Any, Any], until: Callable[[], object]) -> None:
        """Run ``coroutine`` until ``until()`` holds, and then no further."""
        task = self.loop.create_task(coroutine)
        # An unfinished task says so when it is collected.
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.tasks.append(task)
        self.loop.run_until_complete(async_wait_until(until))


@pytest.fixture
def loop(loop_runner: LoopRunner) -> Iterator[Loop]:
    loop = Loop(loop_runner)
    yield loop
    loop.loop.close()


def test_a_grant_to_a_closed_loop_passes_on_at_once(backend: str, loop: Loop, stage: Stage) -> None:
    with running(backend=backend) as manager, ThreadPoolExecutor() as threads:
        held = threads.submit(manager.run_sync, jobs.hold, stage.folder, "held")
        stage.wait_begun("held")
        loop.begin(manager.run(jobs.begin, stage.folder, "lost"), lambda: manager.stats().waiting)
        loop.begin(manager.acquire(), lambda: manager.stats().waiting == 2)
        last = threads.submit(manager.run_sync, jobs.begin, stage.folder, "last")
        wait_until(lambda: manager.stats().waiting == 3)
        loop.loop.close()
        stage.let_go()
        assert last.result(timeout=20) == "last"
        assert held.result() == "held"
        assert stage.begun() == ["held", "last"]
        wait_all_idle(manager)


def test_a_grant_to_a_stopped_loop_is_withdrawn_and_passed_on(
    backend: str, loop: Loop, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "PICKUP_SECONDS", 0.1)
    monkeypatch.setattr(housekeeper_module, "TICK", 0.05)
    with running(backend=backend) as manager, ThreadPoolExecutor() as threads:
        held = threads.submit(manager.run_sync, jobs.hold, stage.folder, "held")
        stage.wait_begun("held")
        loop.begin(manager.run(jobs.begin, stage.folder, "lost"), lambda: manager.stats().waiting)
        loop.begin(manager.acquire(), lambda: manager.stats().waiting == 2)
        last = threads.submit(manager.run_sync, jobs.begin, stage.folder, "last")
        wait_until(lambda: manager.stats().waiting == 3)
        stage.let_go()
        assert held.result() == "held"
        assert last.result(timeout=20) == "last"
        for task in loop.tasks:
            with pytest.raises(LeaseUnavailableError, match="its event loop did not run"):
                loop.loop.run_until_complete(task)
        assert stage.begun() == ["held", "last"]


def test_a_loop_that_was_stopped_for_a_while_finds_its_results(
    backend: str, loop: Loop, stage: Stage
) -> None:
    with running(backend=backend) as manager:
        loop.begin(manager.run(jobs.hold, stage.folder, "held"), stage.begun)
        stage.let_go()
        if backend == "thread":
            wait_until(lambda: manager.stats().idle_workers == 1)
        assert loop.loop.run_until_complete(loop.tasks[0]) == "held"
        wait_all_idle(manager)


def test_a_call_whose_loop_was_closed_gives_its_worker_back(
    backend: str, loop: Loop, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeper_module, "TICK", 0.05)
    with running(backend=backend) as manager:
        loop.begin(manager.run(jobs.hold_worker, stage.folder, "lost"), stage.begun)
        loop.loop.close()
        if backend == "thread":
            stage.let_go("lost")
        assert manager.options(timeout=20).run_sync(jobs.add, 1) == 1
        wait_all_idle(manager)
        assert manager.stats().workers_crashed == 0


def test_a_closed_loop_keeps_nothing_of_the_workers_it_used(loop: Loop) -> None:
    with running(2, backend="process") as manager:
        loop.begin(manager.run(jobs.add, 1), lambda: manager.stats().calls_finished)
        loop.loop.close()
        assert [manager.run_sync(jobs.add, number) for number in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("closed", ["never", "after"])
def test_workers_may_end_while_the_loop_that_used_them_stands_still(
    loop: Loop, closed: str
) -> None:
    with running(2, backend="process") as manager:
        loop.begin(manager.run(jobs.add, 1), lambda: manager.stats().calls_finished)
        manager.stop_sync()
        if closed == "after":
            loop.loop.close()
        else:
            loop.loop.run_until_complete(asyncio.sleep(0))


def test_two_loops_take_turns_on_the_same_worker(loop_runner: LoopRunner) -> None:
    """Each leaves its reader behind, and neither reads what is meant for the other."""
    with running(backend="process") as manager:
        loops = [loop_runner.new_event_loop() for _ in range(2)]
        try:
            for number in range(20):
                loop = loops[number % 2]
                assert loop.run_until_complete(manager.run(jobs.add, number)) == number
                assert manager.run_sync(jobs.add, number) == number
        finally:
            for loop in loops:
                loop.close()
        assert manager.stats().workers_started == 1


def test_a_blocked_loop_does_not_delay_others(backend: str, stage: Stage) -> None:
    async def blocked() -> int:
        call = asyncio.create_task(manager.run(jobs.hold, stage.folder, "held"))
        await stage.wait_begun_async("held")
        stage.let_go()
        with ThreadPoolExecutor(1) as threads:  # the loop stands still until it is done
            assert threads.submit(manager.run_sync, jobs.add, 1).result(timeout=20) == 1
        await call
        return 1

    with running(2, backend=backend) as manager:
        assert asyncio.run(blocked()) == 1


def test_who_waits_for_a_blocked_loop_is_served_when_its_worker_is_free(
    loop_runner: LoopRunner, stage: Stage
) -> None:
    """A worker that finished while its caller's loop was busy is not idle before that looks."""

    async def main() -> None:
        call = asyncio.create_task(manager.run(jobs.hold, stage.folder, "held"))
        await stage.wait_begun_async("held")
        other = threads.submit(manager.run_sync, jobs.add, 1)
        wait_until(lambda: manager.stats().waiting == 1)
        stage.let_go()
        await call
        assert await asyncio.wrap_future(other) == 1

    with running(backend="process") as manager, ThreadPoolExecutor() as threads:
        loop_runner(main())
