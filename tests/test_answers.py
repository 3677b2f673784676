"""A task goes on in the callback that has read its outcome, as if the loop had woken it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from leasepool_django.backends.process import shared
from leasepool_django.engine.answer import Answer
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import assert_full_capacity, running
from tests.waiting import async_wait_until

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """Those whose task went on at once."""
    found: list[Answer] = []
    resume = Answer.resume

    def spy(answer: Answer) -> None:
        resume(answer)
        found.append(answer)

    monkeypatch.setattr(Answer, "resume", spy)
    return found


def run_on_asyncio(coroutine: Any) -> Any:
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop, debug=True) as runner:
        return runner.run(coroutine)


def test_on_asyncio_a_lone_call_needs_no_further_turn_of_the_loop(
    resumed: list[Answer], loop_runner: LoopRunner
) -> None:
    async def calls() -> None:
        for number in range(20):
            assert await manager.run(jobs.slow_echo, number) == number

    with running() as manager:
        loop_runner(calls())
    assert len(resumed) in ({0} if loop_runner.name == "uvloop" else range(10, 21))


def test_it_goes_on_in_its_own_context_and_may_call_again(resumed: list[Answer]) -> None:
    async def one(name: str) -> None:
        variable.set(name)
        task = asyncio.current_task()
        for number in range(10):
            assert await manager.run(jobs.slow_echo, number) == number
            assert variable.get() == name
            assert asyncio.current_task() is task

    async def all_of_them() -> None:
        await asyncio.gather(*(one(name) for name in "ab"))

    with running(2) as manager:
        run_on_asyncio(all_of_them())
    assert variable.get() == "unset"
    assert resumed


@pytest.mark.parametrize("message", [None, "enough"])
def test_a_cancelled_task_hears_why(message: str | None) -> None:
    async def calls() -> None:
        task = asyncio.create_task(manager.run(jobs.spin))
        await async_wait_until(lambda: manager.stats().busy_workers == 1)
        assert task.cancel(message)
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert caught.value.args == (() if message is None else (message,))

    with running() as manager:
        run_on_asyncio(calls())


def test_a_task_that_was_cancelled_before_it_began_to_wait_sends_nothing_on(
    tmp_path: Path,
) -> None:
    async def cancelled_at_once() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await manager.run(jobs.spin)

    async def calls() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(cancelled_at_once())

    with running() as manager:
        run_on_asyncio(calls())
        assert_full_capacity(manager, tmp_path)


def test_what_a_task_raises_to_end_its_loop_costs_no_worker(
    tmp_path: Path, resumed: list[Answer]
) -> None:
    async def leave() -> None:
        await manager.run(jobs.slow_echo, 1)
        raise SystemExit(3)

    with running() as manager:
        pid = manager.run_sync(os.getpid)
        with pytest.raises(SystemExit):
            run_on_asyncio(leave())
        assert manager.run_sync(os.getpid) == pid
        assert_full_capacity(manager, tmp_path)
        assert manager.stats().workers_killed == 0


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_a_task_leaves_is_free_at_once(*, cancelled: bool, resumed: list[Answer]) -> None:
    """Nothing refers to it in a circle, which only the collector would find."""

    async def leave() -> weakref.ref[Any]:
        task = asyncio.create_task(manager.run(jobs.slow_failure))
        if cancelled:
            await async_wait_until(lambda: manager.stats().busy_workers == 1)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or type(task.exception()) is ValueError
        return weakref.ref(task)

    async def calls() -> None:
        gc.collect()
        gc.disable()
        try:
            left = await leave()
            await asyncio.sleep(0)
            assert left() is None
        finally:
            gc.enable()

    with running() as manager:
        run_on_asyncio(calls())
    assert cancelled or resumed


def test_several_tasks_may_not_await_the_same_call() -> None:
    """As of any coroutine."""

    async def calls() -> None:
        call = manager.run(jobs.slow_echo, 1)
        first = asyncio.create_task(call)
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="awaited"):
            await call
        assert await first == 1

    with running() as manager:
        run_on_asyncio(calls())


def test_a_result_that_its_task_has_let_go_of_leaves_its_memory_to_the_next(
    monkeypatch: pytest.MonkeyPatch, resumed: list[Answer]
) -> None:
    np = pytest.importorskip("numpy")
    created: list[int] = []
    create = shared.Segment.create

    def counted(size: int, **options: Any) -> Any:
        created.append(size)
        return create(size, **options)

    async def calls() -> None:
        for _ in range(10):
            await manager.run(jobs.slow_echo, np.ones(100_000))

    monkeypatch.setattr(shared.Segment, "create", counted)
    with running() as manager:
        run_on_asyncio(calls())
    assert resumed
    assert len(created) == 2  # for arguments and for results
