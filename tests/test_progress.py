"""``on_progress``: callers hear what their functions report while they run."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import (
    CallTimeoutError,
    LeasedExecutorManager,
    NotPicklableError,
    UnsupportedBackendError,
)
from leasepool_django.worker import report_progress
from tests import progress_jobs as jobs
from tests.conftest import LoopRunner
from tests.managers import running
from tests.waiting import async_wait_until, wait_until

BACKENDS = ["process", "thread", "inline"]
user = contextvars.ContextVar("user", default="nobody")


@pytest.fixture(params=BACKENDS)
def manager(request: pytest.FixtureRequest) -> Iterator[LeasedExecutorManager]:
    with running(2, backend=request.param) as manager:
        yield manager


@pytest.fixture
def processes() -> Iterator[LeasedExecutorManager]:
    with running(1, backend="process") as manager:
        yield manager


def test_all_is_heard_in_order_on_the_loop_before_the_outcome(
    manager: LeasedExecutorManager, loop_runner: LoopRunner
) -> None:
    async def main() -> None:
        heard: list[tuple[object, object, str]] = []

        def hear(value: object) -> None:
            heard.append((value, asyncio.get_running_loop(), user.get()))

        user.set("somebody")
        call = manager.options(on_progress=hear)
        assert await call.run(jobs.count, 100) == "counted"
        here = asyncio.get_running_loop()
        assert heard == [(number, here, "somebody") for number in range(100)]

    loop_runner(main())


def test_a_blocking_caller_hears_it_too(manager: LeasedExecutorManager) -> None:
    heard: list[tuple[object, str]] = []
    user.set("somebody")
    call = manager.options(on_progress=lambda value: heard.append((value, user.get())))
    assert call.run_sync(jobs.count, 100) == "counted"
    assert heard == [(number, "somebody") for number in range(100)]
    with manager.lease_sync(workers=1) as lease:
        values: list[object] = []
        assert lease.options(on_progress=values.append).run_sync(jobs.report, "x") == "reported"
    assert values == ["x"]


def test_within_a_lease_each_call_has_its_own_listener(manager: LeasedExecutorManager) -> None:
    async def main() -> None:
        heard: dict[int, list[object]] = {number: [] for number in range(6)}
        async with manager.lease() as lease:
            calls = [
                lease.options(on_progress=heard[number].append).run(jobs.report, number)
                for number in heard
            ]
            await asyncio.gather(*calls, lease.run(jobs.report, "nobody listens"))
        assert heard == {number: [number] for number in range(6)}

    asyncio.run(main())


def test_it_is_heard_while_the_function_runs(
    manager: LeasedExecutorManager, tmp_path: Path
) -> None:
    async def main() -> None:
        queue: asyncio.Queue[object] = asyncio.Queue()
        call = manager.options(on_progress=queue.put_nowait)
        task = asyncio.create_task(call.run(jobs.report_and_wait, tmp_path))
        assert await asyncio.wait_for(queue.get(), 20) == "waiting"
        assert not task.done()
        (tmp_path / "go").touch()
        assert await task == "done"
        assert queue.get_nowait() == "going"

    asyncio.run(main())


def test_nothing_happens_where_nobody_listens(manager: LeasedExecutorManager) -> None:
    report_progress("not in a call")
    assert jobs.count(3) == "counted"
    assert manager.run_sync(jobs.count, 3) == "counted"
    heard: list[object] = []
    assert manager.options(on_progress=heard.append).run_sync(jobs.nested, jobs.count, 2)
    assert manager.run_sync(jobs.count, 3) == "counted"  # on the same worker, after it
    assert heard == [0, 1]


def test_what_fails_has_been_heard_and_has_the_functions_frames_only(
    manager: LeasedExecutorManager,
) -> None:
    heard: list[object] = []
    with pytest.raises(ValueError, match="half way") as raised:
        manager.options(on_progress=heard.append).run_sync(jobs.report_and_fail)
    assert heard == ["begun"]
    if manager.backend != "thread":
        names = [entry.name for entry in raised.traceback]
        assert names[-1] == "report_and_fail"
        assert not {"reporting", "call", "carry_out"} & set(names)


def test_the_callers_own_methods_may_report(manager: LeasedExecutorManager) -> None:
    heard: list[object] = []
    assert manager.options(on_progress=heard.append).run_sync(jobs.Counter().count, 2) == "counted"
    assert heard == [0, 1]


def test_threads_report_in_a_copy_of_the_context(manager: LeasedExecutorManager) -> None:
    heard: list[object] = []
    expected = manager.options(on_progress=heard.append).run_sync(jobs.report_from_threads)
    assert heard == expected


def test_a_thread_that_outlives_its_call_is_not_heard(
    manager: LeasedExecutorManager, tmp_path: Path
) -> None:
    heard: list[object] = []
    call = manager.options(on_progress=heard.append)
    assert call.run_sync(jobs.leave_a_thread, tmp_path) == "left"
    (tmp_path / "go").touch()
    wait_until((tmp_path / "late").exists)
    assert call.run_sync(jobs.report, "next") == "reported"
    assert heard == ["next"]


def test_a_caller_that_has_gone_hears_no_more(
    manager: LeasedExecutorManager, tmp_path: Path
) -> None:
    """Also where the function cannot be stopped."""

    async def main() -> None:
        heard: list[object] = []
        call = manager.options(on_progress=heard.append)
        task = asyncio.create_task(call.run(jobs.report_and_wait, tmp_path))
        await async_wait_until(lambda: heard)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (tmp_path / "go").touch()
        if manager.backend != "process":
            await async_wait_until((tmp_path / "done").exists)
        await manager.run(jobs.report, "another")
        assert heard == ["waiting"]

    asyncio.run(main())


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_a_call_whose_time_is_over_is_heard_no_more(backend: str, tmp_path: Path) -> None:
    """Not of ``inline``, where the caller itself runs the function, to its end."""
    heard: list[object] = []
    with running(backend=backend) as manager:
        call = manager.options(on_progress=heard.append, call_timeout=0.2)
        with pytest.raises(CallTimeoutError):
            call.run_sync(jobs.report_and_wait, tmp_path)
        (tmp_path / "go").touch()
        if backend == "thread":
            wait_until((tmp_path / "done").exists)
    assert "going" not in heard


def test_an_error_of_the_listener_is_logged_and_costs_nothing(
    manager: LeasedExecutorManager, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(value: object) -> None:
        raise KeyError(value)

    with caplog.at_level(logging.ERROR, "leasepool"):
        assert manager.options(on_progress=refuse).run_sync(jobs.report, "x") == "reported"
        wait_until(lambda: "raised KeyError('x')" in caplog.text)
    assert "on_progress of a call of tests.progress_jobs.report raised" in caplog.text


@pytest.mark.parametrize("backend", ["process", "inline"])
def test_what_cannot_travel_is_the_functions_error(backend: str) -> None:
    with (
        running(backend=backend) as manager,
        pytest.raises(
            NotPicklableError, match=r"A report of progress cannot be sent: value\['lock"
        ),
    ):
        manager.options(on_progress=print).run_sync(jobs.report_lock)


def test_large_reports_arrive(processes: LeasedExecutorManager) -> None:
    heard: list[Any] = []
    data = bytes(5_000_000)
    processes.options(on_progress=heard.append).run_sync(jobs.report, data)
    assert heard == [data]

    async def main() -> None:
        await processes.options(on_progress=heard.append).run(jobs.report, data)

    asyncio.run(main())
    assert heard == [data, data]


@pytest.mark.parametrize("backend", ["process", "inline"])
def test_a_report_that_cannot_be_unpickled_is_logged(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[object] = []
    with running(backend=backend) as manager:
        judge_unwilling(manager, heard, caplog)


def judge_unwilling(
    manager: LeasedExecutorManager, heard: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    call = manager.options(on_progress=heard.append)
    with caplog.at_level(logging.ERROR, "leasepool"):
        assert call.run_sync(jobs.report_unwilling) == "reported"
        wait_until(lambda: "cannot be told what was reported: ValueError" in caplog.text)
    assert not heard


def test_a_report_that_would_end_the_program_does_not(processes: LeasedExecutorManager) -> None:
    async def main() -> None:
        heard: list[object] = []
        call = processes.options(on_progress=heard.append)
        assert await call.run(jobs.report_exit) == "reported"
        assert await call.run(jobs.report, "next") == "reported"
        assert heard == ["next"]

    asyncio.run(main())


def test_what_is_reported_may_report_itself(manager: LeasedExecutorManager) -> None:
    """As where a signal handler reports while the function does."""
    heard: list[object] = []
    call = manager.options(on_progress=lambda value: heard.append(type(value).__name__))
    assert call.run_sync(jobs.report_talkative) == "reported"
    assert heard == (["Talkative"] if manager.backend == "thread" else ["str", "Talkative"])


def test_a_child_that_is_forked_while_others_report_goes_on(
    processes: LeasedExecutorManager,
) -> None:
    call = processes.options(on_progress=lambda _: None, call_timeout=60)
    assert call.run_sync(jobs.fork_while_reporting, 5) == [0] * 5


def test_a_call_within_a_call_reports_to_its_own_listener() -> None:
    """On threads; in processes no call can make another."""
    heard: list[object] = []
    with running(2, backend="thread") as manager:
        jobs.managers.append(manager)
        try:
            manager.options(on_progress=heard.append).run_sync(jobs.call_another)
        finally:
            jobs.managers.clear()
    assert heard == ["outer"]


def test_a_coroutine_that_is_closed_hears_no_more(tmp_path: Path) -> None:
    async def main(manager: LeasedExecutorManager) -> None:
        heard: list[object] = []
        call = manager.options(on_progress=heard.append).run(jobs.report_and_wait, tmp_path)
        call.send(None)  # it waits; the loop knows nothing of it
        await async_wait_until(lambda: heard)
        call.close()
        (tmp_path / "go").touch()
        await async_wait_until((tmp_path / "done").exists)
        await async_wait_until(lambda: manager.stats().idle_workers == 1)
        assert heard == ["waiting"]

    with running(backend="thread") as manager:
        asyncio.run(main(manager))


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit])
def test_a_listener_may_raise_what_loops_take_for_something_else(
    error: type[BaseException], manager: LeasedExecutorManager
) -> None:
    def refuse(_: object) -> None:
        raise error

    async def main() -> None:
        assert await manager.options(on_progress=refuse).run(jobs.count, 3) == "counted"

    asyncio.run(main())
    assert manager.options(on_progress=refuse).run_sync(jobs.count, 3) == "counted"
    assert manager.stats().workers_crashed == 0


def test_a_forked_child_reports_to_nobody(processes: LeasedExecutorManager) -> None:
    heard: list[object] = []
    assert processes.options(on_progress=heard.append).run_sync(jobs.report_from_a_fork) == 0
    assert not heard


def test_a_full_socket_holds_the_function_and_loses_nothing(
    processes: LeasedExecutorManager,
) -> None:
    """As while the loop is busy with other things."""

    async def main() -> None:
        heard: list[object] = []
        task = asyncio.create_task(
            processes.options(on_progress=heard.append).run(jobs.count, 50_000)
        )
        await async_wait_until(lambda: heard)
        threading.Event().wait(0.2)  # nothing is read meanwhile
        assert await task == "counted"
        assert heard == list(range(50_000))

    asyncio.run(main())


@pytest.mark.parametrize("on_progress", [5, jobs.report_and_wait.__doc__])
def test_a_listener_must_be_callable(on_progress: Any, manager: LeasedExecutorManager) -> None:
    with pytest.raises(TypeError, match="on_progress must be callable"):
        manager.options(on_progress=on_progress)


def test_a_coroutine_function_is_no_listener(manager: LeasedExecutorManager) -> None:
    async def hear(_: object) -> None: ...

    with pytest.raises(TypeError, match="must be a plain function"):
        manager.options(on_progress=hear)

    class Hears:
        async def __call__(self, _: object) -> None: ...

    with pytest.raises(TypeError, match="must be a plain function"):
        manager.options(on_progress=Hears())
    with manager.lease_sync() as lease, pytest.raises(TypeError, match="must be a plain function"):
        lease.options(on_progress=hear)


def test_where_it_cannot_be_heard_it_is_refused() -> None:
    with (
        running(backend="concurrent.futures.ThreadPoolExecutor") as manager,
        pytest.raises(UnsupportedBackendError, match="cannot tell on_progress anything"),
    ):
        manager.options(on_progress=print).run_sync(jobs.report, 1)
