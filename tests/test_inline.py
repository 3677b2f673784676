"""The inline backend: calls in the caller's process that are held to what workers ask for.

What it has in common with all backends is in ``tests.contract``; what it does with databases and
mail, in ``tests.test_database``.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from asgiref.sync import sync_to_async
from django.http import HttpRequest
from django.utils import timezone, translation

from leasepool_django import (
    LeasePoolError,
    NotPicklableError,
    RemoteError,
    pools,
    run_in_pool,
    run_in_pool_sync,
)
from leasepool_django.backends import django_inline
from leasepool_django.worker import in_worker
from tests import inline_jobs as jobs
from tests import jobs as common
from tests import worker_jobs
from tests.conftest import LoopRunner
from tests.managers import running
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    yield
    jobs.initialized.clear()
    jobs.kept.clear()


@pytest.fixture
def inline(settings: Settings) -> Iterator[None]:
    """The project's pools, inline."""
    settings.LEASEPOOL = {"default": {"BACKEND": "inline", "WORKERS_PER_POOL": 2}}
    yield
    pools.reset()


# -- where a call runs ----------------------------------------------------------------------------


def test_a_blocking_caller_runs_the_function_itself() -> None:
    with running(backend="inline") as manager:
        assert manager.run_sync(common.whoami) == common.whoami()


def test_an_event_loop_goes_on_while_a_function_runs(stage: Stage, loop_runner: LoopRunner) -> None:
    async def main() -> None:
        call = asyncio.create_task(manager.run(common.hold, stage.folder, "one"))
        await stage.wait_begun_async("one")
        stage.let_go("one")
        assert await call == "one"
        pid, thread = await manager.run(common.whoami)
        assert pid == common.whoami()[0]
        assert thread != common.whoami()[1]

    with running(backend="inline") as manager:
        loop_runner(main())


def test_calls_of_several_workers_run_side_by_side(stage: Stage) -> None:
    async def main() -> None:
        async with manager.lease() as lease:
            calls = [asyncio.create_task(lease.run(common.hold, stage.folder, n)) for n in "abc"]
            await stage.wait_begun_async("a", "b")
            assert sorted(stage.begun()) == ["a", "b"]
            stage.let_go()
            assert await asyncio.gather(*calls) == ["a", "b", "c"]

    with running(2, backend="inline") as manager:
        asyncio.run(main())


def test_a_function_may_run_an_event_loop_of_its_own(inline: None) -> None:
    async def main() -> int:
        return await run_in_pool(jobs.run_a_loop)

    assert asyncio.run(main()) != threading.get_ident()
    assert run_in_pool_sync(jobs.run_a_loop) == threading.get_ident()


def test_under_django_it_runs_where_asynchronous_code_uses_the_orm(
    inline: None, loop_runner: LoopRunner
) -> None:
    async def main() -> None:
        orm = await sync_to_async(common.whoami)()
        assert await run_in_pool(common.whoami) == orm
        async with pools["default"].lease() as lease:
            calls = (lease.run(common.whoami) for _ in range(5))
            assert await asyncio.gather(*calls) == [orm] * 5

    loop_runner(main())


# -- what is asked of calls -----------------------------------------------------------------------


@pytest.mark.parametrize("function", [lambda: 1, common.nested()], ids=["lambda", "nested"])
def test_a_function_must_be_found_by_its_name(function: Callable[[], int]) -> None:
    with running(backend="inline") as manager:
        with pytest.raises(NotPicklableError, match=r"where a worker cannot find|which a worker"):
            manager.run_sync(function)
        with pytest.raises(NotPicklableError):
            asyncio.run(manager.run(function))


def test_a_request_is_refused_as_for_processes(inline: None) -> None:
    with pytest.raises(NotPicklableError, match="a request belongs to its connection"):
        run_in_pool_sync(jobs.keep, HttpRequest())
    with pytest.raises(NotPicklableError, match="a request belongs to its connection"):
        run_in_pool_sync(print, bytes(100_000), HttpRequest())


def test_arguments_and_results_must_be_picklable() -> None:
    with running(backend="inline") as manager:
        with pytest.raises(NotPicklableError) as raised:
            manager.run_sync(jobs.keep, {"client": threading.Lock()})
        assert raised.value.path == "args[0]['client']"
        with pytest.raises(NotPicklableError) as raised:
            manager.run_sync(common.make_lock)
        assert raised.value.path == "result"
        assert jobs.kept == []


@pytest.mark.parametrize(
    "value",
    [["small"], bytearray(100_000), np.zeros(100_000), ["x" * 200_000, np.ones(3)]],
    ids=["list", "large bytearray", "array", "mixed"],
)
def test_arguments_and_results_are_copies(value: Any) -> None:
    with running(backend="inline") as manager:
        result = manager.run_sync(jobs.keep, value)
        (argument,) = jobs.kept
        assert repr(value) == repr(argument) == repr(result)
        assert len({id(value), id(argument), id(result)}) == 3
        if isinstance(value, bytearray | np.ndarray):
            argument[0] = 7
            result[0] = 8
            assert (value[0], argument[0], result[0]) == (0, 7, 8)


def test_a_changed_argument_is_the_functions_own() -> None:
    with running(backend="inline") as manager:
        items = ["one"]
        assert manager.run_sync(common.append_to, items, "two") == ["one", "two"]
        assert asyncio.run(manager.run(common.append_to, items, "two")) == ["one", "two"]
        assert items == ["one"]


def test_a_call_has_a_context_of_its_own() -> None:
    jobs.request_id.set("the caller's")
    with running(backend="inline") as manager:
        for _ in range(2):
            assert manager.run_sync(jobs.set_request_id, "the function's") == "none"
            assert asyncio.run(manager.run(jobs.set_request_id, "the function's")) == "none"
    assert jobs.request_id.get() == "the caller's"


def test_what_is_named_in_context_comes_along() -> None:
    jobs.request_id.set("the caller's")
    with running(backend="inline", context=["tests.inline_jobs.request_id"]) as manager:
        assert manager.run_sync(jobs.set_request_id, "the function's") == "the caller's"
        assert asyncio.run(manager.run(jobs.set_request_id, "x")) == "the caller's"
    assert jobs.request_id.get() == "the caller's"


def test_language_and_time_zone_come_along(inline: None, settings: Settings) -> None:
    def seen() -> list[Any]:
        async def view() -> Any:
            return await run_in_pool(worker_jobs.language_and_zone)

        return [run_in_pool_sync(worker_jobs.language_and_zone), asyncio.run(view())]

    assert seen() == [("en", "Yes", "12:00 UTC")] * 2
    with translation.override("de"), timezone.override("America/New_York"):
        assert seen() == [("de", "Ja", "08:00 EDT")] * 2
    settings.LANGUAGE_CODE = "de"
    assert seen()[0][:2] == ("de", "Ja")
    with translation.override("en"):
        assert seen()[0][:2] == ("en", "Yes")
    run_in_pool_sync(worker_jobs.activate_something_else)
    assert translation.get_language() == "de"


def test_pools_are_refused_in_a_call_as_in_a_worker(inline: None) -> None:
    with pytest.raises(LeasePoolError, match="cannot be used inside a worker"):
        run_in_pool_sync(jobs.use_pools)
    with pytest.raises(LeasePoolError, match="cannot be used inside a worker"):
        asyncio.run(_awaited(jobs.use_pools))
    assert "inline" in jobs.use_pools()
    assert not run_in_pool_sync(in_worker)


async def _awaited(function: Callable[[], Any]) -> Any:
    return await run_in_pool(function)


# -- exceptions -----------------------------------------------------------------------------------


def test_an_exception_is_a_copy_with_the_frames_of_the_function() -> None:
    with running(backend="inline") as manager:
        with pytest.raises(ValueError, match=r"^6$") as raised:
            manager.run_sync(jobs.fail_with_local, "secret")
        frames = [frame for frame, _ in traceback.walk_tb(raised.value.__traceback__)]
        # A debugger can look into it.
        assert frames[-1].f_locals == {"secret": "secret", "local": "SECRET"}
        assert not any("backends" in frame.f_code.co_filename for frame in frames)


def test_an_exception_that_cannot_be_pickled_arrives_as_from_a_worker() -> None:
    with running(backend="inline") as manager:
        with pytest.raises(RemoteError, match="it has a lock inside") as raised:
            manager.run_sync(jobs.raise_unpicklable)
        assert raised.value.type_name == "tests.inline_jobs.UnpicklableError"
        assert "raise_unpicklable" in (raised.value.traceback_text or "")


def test_ctrl_c_goes_through_and_costs_no_worker() -> None:
    with running(backend="inline") as manager:
        with pytest.raises(KeyboardInterrupt):
            manager.run_sync(jobs.press_ctrl_c)
        # Nobody presses keys on other threads.
        with pytest.raises(RemoteError, match="KeyboardInterrupt"):
            asyncio.run(manager.run(jobs.press_ctrl_c))
        assert manager.run_sync(common.add, 1) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_call_had_is_let_go_without_the_collector(
    fails: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    def call() -> None:
        if fails:
            with pytest.raises(ValueError, match="watched"):
                manager.run_sync(jobs.watch, jobs.Watched(), fails=True)
        else:
            manager.run_sync(jobs.watch, jobs.Watched())

    with running(backend="inline") as manager:
        gc.disable()
        try:
            call()
            (argument,) = jobs.kept
            assert argument() is None
        finally:
            gc.enable()


# -- giving up ------------------------------------------------------------------------------------


def test_one_who_gives_up_is_told_and_the_function_runs_to_its_end(stage: Stage) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await manager.run(common.hold, stage.folder, "abandoned")
        assert manager.stats().idle_workers == 0
        stage.let_go("abandoned")
        await async_wait_until(lambda: manager.stats().idle_workers == 1)
        assert await manager.run(common.add, 1) == 1

    with running(backend="inline") as manager:
        asyncio.run(main())
        assert manager.stats().workers_killed == 1


def test_a_call_that_is_given_up_before_it_begins_never_runs(inline: None, stage: Stage) -> None:
    async def main() -> None:
        # Two workers, but one thread for all that is asynchronous: the second call waits for it.
        first = asyncio.create_task(run_in_pool(common.hold, stage.folder, "first"))
        await stage.wait_begun_async("first")
        second = asyncio.create_task(run_in_pool(common.begin, stage.folder, "second"))
        await async_wait_until(lambda: pools["default"].stats().busy_workers == 2)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await async_wait_until(lambda: pools["default"].stats().idle_workers == 1)
        stage.let_go()
        assert await first == "first"
        assert await run_in_pool(common.begin, stage.folder, "third") == "third"

    asyncio.run(main())
    assert stage.begun() == ["first", "third"]


def test_a_loop_that_ends_takes_its_calls_along(inline: None, stage: Stage) -> None:
    async def main() -> None:
        # Started at first use, both at once: which of them comes first is not promised.
        left = [asyncio.create_task(run_in_pool(common.hold, stage.folder, name)) for name in "ab"]
        await async_wait_until(stage.begun)
        await async_wait_until(lambda: pools["default"].stats().busy_workers == 2)
        assert len(left) == 2

    asyncio.run(main())
    stage.let_go()
    wait_until(lambda: pools["default"].stats().idle_workers == 2)
    assert len(stage.begun()) == 1


def test_a_call_for_which_there_is_no_thread_fails_and_costs_no_worker(
    inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_thread(job: Callable[[], None]) -> None:
        raise RuntimeError("would deadlock")

    async def main() -> None:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="would deadlock"):
                await run_in_pool(common.add, 1)

    monkeypatch.setattr(django_inline, "in_thread", no_thread)
    asyncio.run(main())
    wait_until(lambda: pools["default"].stats().idle_workers == 2)
    assert run_in_pool_sync(common.add, 1) == 1
