"""Short calls are sent ahead to busy workers: each is begun once, and where a worker is free.

What becomes of such a call when the one before it, its worker, its caller or its lease ends.

Long because these are the ways in which one kind of call may go wrong.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import (
    CallTimeoutError,
    LeasedExecutorManager,
    LeasePoolNotStartedError,
    LeaseReleasedError,
    LeaseTimeoutError,
    WorkerCrashedError,
)
from leasepool_django.backends.process import tray
from leasepool_django.backends.process.driver import ProcessWorker
from leasepool_django.engine.ahead import SendingAhead
from leasepool_django.engine.dispatcher import Dispatcher
from leasepool_django.engine.line import Call
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import assert_full_capacity, running, wait_all_idle, workers_of
from tests.waiting import async_wait_until, wait_until

pytestmark = pytest.mark.skipif(not tray.SUPPORTED, reason="nothing is sent ahead here")

Run = Callable[..., Awaitable[Any]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many calls were sent ahead, and how many were taken back from a worker's tray."""
    counts: Counter[str] = Counter()
    put_ahead, take_back = ProcessWorker.put_ahead, ProcessWorker.take_back

    def count_put(worker: ProcessWorker, call: Call) -> bool:
        done = put_ahead(worker, call)
        counts["put_ahead"] += done
        return done

    def count_taken(worker: ProcessWorker, taken: list[bytes]) -> None:
        take_back(worker, taken)
        counts["take_back"] += bool(taken)

    monkeypatch.setattr(ProcessWorker, "put_ahead", count_put)
    monkeypatch.setattr(ProcessWorker, "take_back", count_taken)
    return counts


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long calls take in the mean, the next ones are sent ahead."""
    monkeypatch.setattr(SendingAhead, "seconds", math.inf)


async def tiny(run: Run, count: int) -> None:
    """So many calls at once, each of which gets its own answer."""
    numbers = range(count)
    assert await asyncio.gather(*(run(jobs.echo, number) for number in numbers)) == [*numbers]


def marks(path: Path) -> Counter[int]:
    """How often each number was left there."""
    return Counter(map(int, path.read_text().split())) if path.exists() else Counter()


async def outcomes(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    async with asyncio.timeout(40):
        return await asyncio.gather(*tasks, return_exceptions=True)


def started(run: Run, *calls: tuple[Any, ...]) -> list[asyncio.Task[Any]]:
    async def one(call: tuple[Any, ...]) -> Any:
        return await run(*call)

    return [asyncio.create_task(one(call)) for call in calls]


async def more_done(tasks: list[asyncio.Task[Any]], count: int) -> None:
    """Let the loop run until so many more have ended, or all."""
    goal = min(sum(task.done() for task in tasks) + count, len(tasks))
    await async_wait_until(lambda: sum(task.done() for task in tasks) >= goal, timeout=40)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.usefixtures("always")  # on a busy machine the mean of short calls may be long
def test_short_calls_are_sent_ahead(
    method: str, loop_runner: LoopRunner, seen: Counter[str]
) -> None:
    with running(2, mp_context=method) as manager:
        loop_runner(tiny(manager.run, 2_000))
        assert seen["put_ahead"] > 500
        stats = manager.stats()
        assert stats.calls_started == stats.calls_finished == 2_000
        assert not stats.waiting


def test_long_calls_are_not(seen: Counter[str], loop_runner: LoopRunner) -> None:
    async def calls() -> None:
        await asyncio.gather(*(manager.run(time.sleep, 0.005) for _ in range(60)))

    with running(2) as manager:
        loop_runner(calls())
    assert not seen


def test_nor_are_large_ones(seen: Counter[str], loop_runner: LoopRunner) -> None:
    async def calls() -> None:
        data = bytes(tray.LARGEST)
        assert set(await asyncio.gather(*(manager.run(len, data) for _ in range(300)))) == {
            len(data)
        }

    with running(2) as manager:
        loop_runner(tiny(manager.run, 200))
        seen.clear()
        loop_runner(calls())
    assert not seen["put_ahead"]


def test_nor_are_any_behind_one_that_is_not_all_sent(
    loop_runner: LoopRunner, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsent: list[bool] = []
    may_put_ahead = ProcessWorker.may_put_ahead

    def watched(worker: ProcessWorker, call: Call) -> bool:
        may = may_put_ahead(worker, call)
        if worker._unsent:
            unsent.append(may)
        return may

    async def calls() -> list[Any]:
        echoes = (manager.run(jobs.echo, number) for number in range(40))
        return await asyncio.gather(*(one for echo in echoes for one in (with_data(), echo)))

    async def with_data() -> int:
        return int(await manager.run(len, data))

    monkeypatch.setattr(ProcessWorker, "may_put_ahead", watched)
    data = bytes(60_000)
    with running(1) as manager:
        (worker,) = workers_of(manager)
        worker.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
        answers = loop_runner(calls())
    assert answers == [one for number in range(40) for one in (len(data), number)]
    assert unsent
    assert not any(unsent)


def test_each_runs_at_most_once_though_workers_are_killed(
    tmp_path: Path, loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    """One call is lost for each that is killed, and no more."""
    path = tmp_path / "marks"
    kills = 0
    over = threading.Event()
    chance = random.Random(7)

    def kill() -> None:
        nonlocal kills
        while not over.wait(chance.uniform(0.001, 0.02)):
            for worker in manager.stats().pools[0].workers:
                # One that has not done anything would be replaced later and later.
                if worker.pid and worker.calls > 3 and worker.state == "busy":
                    with suppress(ProcessLookupError):
                        os.kill(worker.pid, signal.SIGKILL)
                    kills += 1
                    break

    async def calls() -> list[Any]:
        numbers = range(800)
        return await outcomes(
            started(manager.run, *((jobs.mark_number_and_work, path, n) for n in numbers))
        )

    with running(3) as manager:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            answers = loop_runner(calls())
        finally:
            over.set()
            killer.join()
        wait_all_idle(manager)
    found = marks(path)
    assert max(found.values()) == 1
    lost = [n for n, answer in enumerate(answers) if isinstance(answer, WorkerCrashedError)]
    assert {n for n, answer in enumerate(answers) if answer == n} <= found.keys()
    assert all(answer == n for n, answer in enumerate(answers) if n not in lost)
    assert 5 < len(lost) <= kills
    assert seen["put_ahead"] > 300
    assert seen["take_back"] > 5


@pytest.mark.parametrize("leased", [False, True])
def test_what_comes_after_a_crash_runs_elsewhere(
    tmp_path: Path, loop_runner: LoopRunner, seen: Counter[str], always: None, *, leased: bool
) -> None:
    path = tmp_path / "marks"

    async def calls() -> None:
        async def all_on(run: Run) -> list[Any]:
            return await outcomes(
                started(
                    run,
                    *(
                        (jobs.kill_own_process,) if n % 20 == 10 else (jobs.mark_number, path, n)
                        for n in range(300)
                    ),
                )
            )

        if leased:
            async with manager.lease() as lease:
                answers = await all_on(lease.run)
        else:
            answers = await all_on(manager.run)
        for n, answer in enumerate(answers):
            if n % 20 == 10:
                assert isinstance(answer, WorkerCrashedError)
                assert answer.signal_name == "SIGKILL"
            else:
                assert answer == n

    with running(2) as manager:
        loop_runner(calls())
        assert manager.stats().calls_started == 300
        wait_until(lambda: manager.stats().workers_crashed == 15)  # soon after its caller is told
    assert set(marks(path).values()) == {1}
    assert seen["put_ahead"] > 100


def test_who_is_cancelled_stops_nobody_else(
    tmp_path: Path, loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    path = tmp_path / "marks"

    async def calls() -> None:
        chance = random.Random(3)
        tasks = started(manager.run, *((jobs.mark_number_and_work, path, n) for n in range(600)))
        await more_done(tasks, 1)
        while pending := [task for task in tasks if not task.done()]:
            for task in chance.sample(pending[:6], min(2, len(pending))):
                task.cancel()
            await more_done(tasks, chance.randrange(4, 24))
        for n, answer in enumerate(await outcomes(tasks)):
            assert answer == n or isinstance(answer, asyncio.CancelledError)

    with running(2) as manager:
        loop_runner(calls())
        wait_all_idle(manager)
        stats = manager.stats()
        assert stats.workers_crashed == 0
        assert stats.calls_finished > 200
        assert stats.calls_abandoned > 3
    assert set(marks(path).values()) == {1}
    assert seen["put_ahead"] > 50


@pytest.mark.parametrize("leased", [False, True])
def test_none_is_stuck_behind_a_long_one(
    tmp_path: Path, loop_runner: LoopRunner, seen: Counter[str], always: None, *, leased: bool
) -> None:
    """The other worker takes what had been sent to the one that is held up."""

    async def calls(run: Run) -> None:
        tasks = started(run, *((jobs.echo, n) for n in range(100)))
        tasks += started(run, (jobs.hold, tmp_path), *((jobs.echo, n) for n in range(100)))
        held = tasks[100]
        short = [task for task in tasks if task is not held]
        async with asyncio.timeout(15):
            assert await asyncio.gather(*short) == [*range(100), *range(100)]
        assert not held.done()
        (tmp_path / "go").touch()
        assert isinstance(await held, int)

    async def all_calls() -> None:
        if leased:
            async with manager.lease() as lease:
                await calls(lease.run)
        else:
            await calls(manager.run)

    with running(2) as manager:
        loop_runner(all_calls())
    assert seen["put_ahead"]
    assert seen["take_back"]


def test_one_that_waits_behind_a_long_one_goes_before_those_who_came_later(
    tmp_path: Path, loop_runner: LoopRunner, seen: Counter[str]
) -> None:
    """It has to wait for a millisecond or so, however many others there are."""

    async def calls() -> None:
        await tiny(manager.run, 300)
        tasks = started(manager.run, *((jobs.echo, n) for n in range(40)))
        tasks += started(manager.run, (jobs.hold, tmp_path))
        tasks += started(manager.run, *((jobs.echo, n) for n in range(2_000)))
        order = []
        for n, task in enumerate(tasks[41:]):
            task.add_done_callback(lambda _, n=n: order.append(n))  # type: ignore[misc]
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks[41:])
        assert max(place - n for place, n in enumerate(order)) < 500
        assert max(abs(order.index(n) - n) for n in range(40)) < 500
        (tmp_path / "go").touch()
        await tasks[40]

    with running(2) as manager:
        loop_runner(calls())


def test_only_the_call_that_takes_too_long_is_stopped(
    loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    async def calls() -> None:
        run = manager.options(call_timeout=0.5).run
        jobs_of_100 = [(jobs.spin,) if n % 50 == 20 else (jobs.echo, n) for n in range(200)]
        answers = await outcomes(started(run, *jobs_of_100))
        for n, answer in enumerate(answers):
            if n % 50 == 20:
                assert isinstance(answer, CallTimeoutError)
                assert "spin" in str(answer)
            else:
                assert answer == n

    with running(2) as manager:
        loop_runner(calls())
        wait_until(lambda: manager.stats().workers_killed == 4)
    assert seen["put_ahead"]


def test_limits_hold_while_the_loop_is_blocked(
    loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    """The worker goes on by itself; its first call is done, and in time, though nobody has read."""

    async def calls() -> None:
        run = manager.options(call_timeout=1.0).run
        await tiny(run, 100)
        seen.clear()
        tasks = started(run, *((jobs.echo, n) for n in range(20)), (jobs.spin,))
        tasks += started(run, *((jobs.echo, n) for n in range(20)))
        await tasks[0]
        for _ in range(12):
            await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251 - it is to be blocked
        answers = await outcomes(tasks)
        assert isinstance(answers.pop(20), CallTimeoutError)
        assert answers == [*range(20), *range(20)]

    with running(1) as manager:
        loop_runner(calls())
        assert manager.stats().workers_killed >= 1
    assert seen["put_ahead"]


def test_who_has_waited_too_long_hears_of_it_also_from_the_tray(
    tmp_path: Path, loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    path = tmp_path / "marks"

    async def calls() -> None:
        tasks = started(
            manager.options(timeout=0.5).run,
            *((jobs.echo, n) for n in range(30)),
            (jobs.hold, tmp_path),
            *((jobs.mark_number, path, n) for n in range(30)),
        )
        _, waiting = await asyncio.wait(tasks, timeout=15, return_when=asyncio.FIRST_EXCEPTION)
        assert tasks[30] in waiting
        answers = await outcomes(tasks[31:])
        assert {type(answer) for answer in answers} == {LeaseTimeoutError}
        (tmp_path / "go").touch()
        await tasks[30]
        await manager.run(jobs.echo, 1)

    with running(1) as manager:
        loop_runner(calls())
    assert not marks(path)
    assert seen["take_back"]


def test_a_lease_that_is_released_takes_back_what_it_has_sent(
    tmp_path: Path, loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    path = tmp_path / "marks"

    async def calls() -> None:
        lease = await manager.acquire()
        tasks = started(lease.run, *((jobs.echo, n) for n in range(50)))
        tasks += started(lease.run, (jobs.hold, tmp_path))
        tasks += started(lease.run, *((jobs.mark_number_and_work, path, n) for n in range(2_000)))
        tasks += started(lease.run, (jobs.hold, tmp_path, "other"))
        await more_done(tasks, 200)
        await lease.release()
        begun = {n for n, answer in enumerate(await outcomes(tasks[51:-1])) if answer == n}
        answers = [task.exception() for n, task in enumerate(tasks[51:]) if n not in begun]
        assert {type(answer) for answer in answers} == {LeaseReleasedError}
        assert len(answers) > 100
        assert marks(path).keys() == begun
        (tmp_path / "go").touch()
        await outcomes(tasks[:51])

    with running(2) as manager:
        loop_runner(calls())
        assert_full_capacity(manager, tmp_path)
    assert seen["put_ahead"]
    assert seen["take_back"]


def test_a_stop_loses_nobody(
    tmp_path: Path, loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    path = tmp_path / "marks"

    async def calls(manager: LeasedExecutorManager) -> None:
        tasks = started(manager.run, *((jobs.mark_number, path, n) for n in range(2_000)))
        await more_done(tasks, 500)
        await manager.stop(grace=5)
        for n, answer in enumerate(await outcomes(tasks)):
            assert answer == n or isinstance(answer, LeasePoolNotStartedError)
            assert (answer == n) == (marks(path)[n] == 1)

    with running(2) as manager:
        loop_runner(calls(manager))
    assert set(marks(path).values()) == {1}
    assert seen["put_ahead"]


def test_large_results_and_short_calls_do_not_mix_up(
    loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    """A result in shared memory stays as it was, though its worker could have gone on."""

    async def calls() -> None:
        kept: list[bytearray] = []

        async def large(n: int) -> None:
            result = await manager.run(bytearray, 300_000 + n)
            result[:] = bytes([n % 251]) * len(result)
            kept.append(result)

        await asyncio.gather(
            *(large(n) if n % 7 == 3 else tiny(manager.run, 3) for n in range(300))
        )
        assert len(kept) == 43
        for result in kept:
            n = len(result) - 300_000
            assert result == bytes([n % 251]) * len(result)

    with running(2) as manager:
        loop_runner(calls())
    assert seen["put_ahead"]


def test_a_worker_that_leaves_takes_nothing_with_it(
    loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    with running(2, max_tasks_per_child=7) as manager:
        loop_runner(tiny(manager.run, 400))
        assert manager.stats().workers_crashed == 0
    assert seen["put_ahead"]
    assert seen["take_back"]


@pytest.mark.parametrize("job", [jobs.close_everything, jobs.fill_tray])
def test_a_function_that_meddles_with_the_tray_costs_its_worker(
    job: Any, loop_runner: LoopRunner, always: None
) -> None:
    async def calls() -> None:
        tasks = started(manager.run, *((jobs.echo, n) for n in range(60)), (job,))
        tasks += started(manager.run, *((jobs.echo, n) for n in range(60)))
        answers = await outcomes(tasks)
        assert job is jobs.close_everything or answers[60] is None
        del answers[60]
        assert answers == [*range(60), *range(60)]

    with running(1) as manager:
        loop_runner(calls())
        assert manager.stats().workers_crashed == 1


def test_who_writes_into_the_socket_takes_at_most_the_next_call_with_it(
    tmp_path: Path, loop_runner: LoopRunner, seen: Counter[str], always: None
) -> None:
    """If its worker has begun it before the loop has read what is there."""
    path = tmp_path / "marks"

    async def calls() -> None:
        tasks = started(manager.run, *((jobs.echo, n) for n in range(20)))
        tasks += started(manager.run, (jobs.write_into_own_socket,))
        tasks += started(manager.run, *((jobs.mark_number_and_work, path, n) for n in range(30)))
        await asyncio.wait(tasks[:20])
        time.sleep(0.2)  # noqa: ASYNC251 - what is next there is begun, and nobody reads
        answers = await outcomes(tasks)
        assert answers[:20] == [*range(20)]
        assert isinstance(answers[20], WorkerCrashedError)
        if isinstance(answers[21], WorkerCrashedError):
            answers[21] = 0
        assert answers[21:] == [*range(30)]

    with running(1) as manager:
        loop_runner(calls())
        assert manager.stats().workers_crashed == 1
        assert 0 < manager.stats().mean_call_seconds < 5
    assert max(marks(path).values()) == 1
    assert seen["put_ahead"]


class Interruption(Exception):  # noqa: N818
    """Raised by a signal handler, at any point."""


@pytest.mark.parametrize("step", ["begin", "call_ended"])
def test_an_interruption_while_a_call_gets_its_worker_leaves_nobody_waiting(
    loop_runner: LoopRunner, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Neither whose outcome it was, nor the next one, who has been given the worker."""
    monkeypatch.setattr(SendingAhead, "seconds", 0.0)
    left = [True]

    def interrupted(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if left and options.get("eager") is not True:
            left.clear()
            raise Interruption
        return original(*arguments, **options)

    async def calls() -> list[Any]:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        await tiny(manager.run, 10)
        owner = ProcessWorker if step == "begin" else manager._supervisor
        original = getattr(owner, step)
        tasks = started(manager.run, *((time.sleep, 0.05) for _ in range(2)))
        await async_wait_until(lambda: manager.stats().waiting == 1)
        monkeypatch.setattr(owner, step, lambda *a, **o: interrupted(original, *a, **o))
        async with asyncio.timeout(30):
            answers = await outcomes(tasks)
        assert not left
        assert await manager.run(abs, -7) == 7
        return answers

    with running(1) as manager:
        answers = loop_runner(calls())
    assert any(isinstance(answer, WorkerCrashedError) for answer in answers)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("step", ["_handle", "_go_on", "put_ahead", "look_ahead"])
def test_an_interruption_on_the_loops_thread_mixes_up_no_answers(
    tmp_path: Path,
    loop_runner: LoopRunner,
    monkeypatch: pytest.MonkeyPatch,
    always: None,
    step: str,
    *,
    done: bool,
) -> None:
    """Where a loop is run again after Ctrl-C."""
    path = tmp_path / "marks"
    owner = Dispatcher if step == "look_ahead" else ProcessWorker
    original = getattr(owner, step)
    times = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal times
        times += 1
        if times % 50 != 20:
            return original(*arguments)
        if done:
            original(*arguments)
        raise Interruption

    async def calls() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        tasks = started(manager.run, *((jobs.mark_number, path, n) for n in range(300)))
        answers = await outcomes(tasks)
        monkeypatch.undo()
        told = WorkerCrashedError | Interruption
        for n, answer in enumerate(answers):
            assert answer == n or isinstance(answer, told)

    with running(2) as manager:
        loop_runner(tiny(manager.run, 10))
        monkeypatch.setattr(owner, step, interrupted)
        if step == "look_ahead":
            monkeypatch.setattr(
                manager._supervisor, step, partial(interrupted, manager._dispatcher)
            )
        loop_runner(calls())
        assert_full_capacity(manager, tmp_path)
    assert times > 100
    assert set(marks(path).values()) == {1}


def test_calls_of_several_loops_get_their_own_answers() -> None:
    """Each loop on a thread of its own, with the same workers."""

    def loop() -> None:
        asyncio.run(tiny(manager.run, 1_000))

    with running(2) as manager:
        threads = [threading.Thread(target=loop) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in threads)
        assert manager.stats().calls_finished == 2_000
