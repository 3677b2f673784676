"""Calls, on every backend: results, errors, refusals, limits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from leasepool_django import (
    CallTimeoutError,
    LeaseTimeoutError,
    LeaseUnavailableError,
    RemoteError,
)
from tests import jobs
from tests.conftest import LoopRunner
from tests.contract.conftest import ISOLATED, KINDS, Kind
from tests.managers import wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_call_returns_what_the_function_returns(kind: Kind, loop_runner: LoopRunner) -> None:
    async def main() -> None:
        assert await manager.run(jobs.add, 20, right=22) == 42
        async with manager.lease() as lease:
            assert await lease.run(jobs.add, 20, right=22) == 42

    with kind.running(2) as manager:
        loop_runner(main())
        assert manager.run_sync(jobs.add, 20, right=22) == 42
        with manager.lease_sync() as lease:
            assert lease.run_sync(jobs.add, 20, right=22) == 42


def test_every_keyword_is_the_functions_own(kind: Kind) -> None:
    names = {"fn": 1, "self": 2, "lease": 3, "timeout": 4, "call_timeout": 5, "owner": 6}

    async def main() -> None:
        assert await manager.run(jobs.keywords, **names) == names
        assert await manager.options(timeout=20).run(jobs.keywords, **names) == names
        async with manager.lease() as lease:
            assert await lease.run(jobs.keywords, **names) == names
            assert await lease.options(call_timeout=20).run(jobs.keywords, **names) == names

    with kind.running() as manager:
        asyncio.run(main())
        assert manager.run_sync(jobs.keywords, **names) == names
        assert manager.options(owner="me").run_sync(jobs.keywords, **names) == names
        with manager.lease_sync() as lease:
            assert lease.run_sync(jobs.keywords, **names) == names
            assert lease.options().run_sync(jobs.keywords, **names) == names
            assert lease.executor.submit(jobs.keywords, **names).result() == names


def test_an_event_loop_never_runs_the_function_itself(kind: Kind) -> None:
    with kind.running() as manager:
        assert asyncio.run(manager.run(jobs.whoami)) != jobs.whoami()
        if kind.flags.supports_prompt_deadlines:
            assert manager.run_sync(jobs.whoami) != jobs.whoami()


def test_arguments_and_results_are_copies_where_calls_are_isolated(kind: Kind) -> None:
    with kind.running() as manager:
        items = ["one"]
        assert manager.run_sync(jobs.append_to, items, "two") == ["one", "two"]
        if kind.flags.supports_isolation:
            assert items == ["one"]


def test_an_exception_arrives_as_itself(kind: Kind) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=r"^out of stock$"):
            await manager.run(jobs.fail, "out of stock")
        async with manager.lease() as lease:
            with pytest.raises(ValueError, match=r"^out of stock$"):
                await lease.run(jobs.fail, "out of stock")

    with kind.running() as manager:
        asyncio.run(main())
        with pytest.raises(ValueError, match=r"^out of stock$"):
            manager.run_sync(jobs.fail, "out of stock")
        with manager.lease_sync() as lease, pytest.raises(ValueError, match=r"^out of stock$"):
            lease.run_sync(jobs.fail, "out of stock")
        assert manager.run_sync(jobs.add, 1) == 1


# Those that would end or confuse the caller's event loop, and the names they are told by.
UNFIT_TO_RAISE: dict[Callable[[], object], str] = {
    jobs.raise_stop_iteration: "StopIteration",
    jobs.raise_stop_async_iteration: "StopAsyncIteration",
    jobs.raise_system_exit: "SystemExit",
    jobs.raise_keyboard_interrupt: "KeyboardInterrupt",
    jobs.raise_cancelled: "asyncio.exceptions.CancelledError",
    jobs.raise_generator_exit: "GeneratorExit",
}


def test_what_would_end_or_confuse_the_caller_arrives_as_remote_error(kind: Kind) -> None:
    with kind.running() as manager:
        for job, name in UNFIT_TO_RAISE.items():
            with pytest.raises(RemoteError, match="no more") as raised:
                asyncio.run(manager.run(job))
            assert raised.value.type_name == name
            assert raised.value.text == "no more"
            assert raised.value.traceback_text is not None
            assert job.__name__ in raised.value.traceback_text
            with pytest.raises(RemoteError, match="no more"):
                manager.run_sync(job)
        assert manager.run_sync(jobs.add, 1) == 1
        assert manager.stats().workers_crashed == 0


# Also what hides a coroutine function from a first look.
NO_PLAIN_FUNCTIONS: list[Any] = [
    jobs.coroutine_function,
    partial(jobs.coroutine_function, 1),
    jobs.AsyncCallable(),
    partial(jobs.AsyncCallable()),
    "tests.jobs.add",
    None,
]


def test_what_is_no_plain_function_is_refused_before_it_is_sent(kind: Kind) -> None:
    async def main(function: Any) -> None:
        with pytest.raises(TypeError):
            await manager.run(function)
        async with manager.lease() as lease:
            with pytest.raises(TypeError):
                await lease.run(function)

    with kind.running() as manager:
        for function in NO_PLAIN_FUNCTIONS:
            asyncio.run(main(function))
            with pytest.raises(TypeError):
                manager.run_sync(function)
        assert manager.stats().calls_started == 0
        assert manager.stats().idle_workers == 1


@pytest.mark.parametrize("name", ISOLATED)
def test_a_result_that_cannot_travel_is_an_error_for_its_caller_only(name: str) -> None:
    with KINDS[name].running() as manager:
        before = manager.run_sync(jobs.whoami)
        with pytest.raises(TypeError, match="lock"):
            manager.run_sync(jobs.make_lock)
        assert manager.run_sync(jobs.whoami) == before


def test_one_shot_calls_use_every_worker(kind: Kind, stage: Stage) -> None:
    """Four callers, four workers: nobody waits, and the fifth does until one is free."""

    async def main() -> None:
        calls = [asyncio.create_task(manager.run(jobs.hold, stage.folder, n)) for n in "abcd"]
        await stage.wait_begun_async(*"abcd")
        fifth = asyncio.create_task(manager.run(jobs.hold, stage.folder, "e"))
        await async_wait_until(lambda: manager.stats().waiting == 1)
        stage.let_go("b")
        await stage.wait_begun_async("e")
        stage.let_go()
        assert await asyncio.gather(*calls, fifth) == list("abcde")

    with kind.running(4) as manager:
        asyncio.run(main())


def test_callers_are_served_in_the_order_in_which_they_came(kind: Kind, stage: Stage) -> None:
    async def main() -> None:
        first = asyncio.create_task(manager.run(jobs.hold, stage.folder, "first"))
        await stage.wait_begun_async("first")
        names = [f"caller {number}" for number in range(12)]
        calls = []
        for name in names:
            calls.append(asyncio.create_task(manager.run(jobs.begin, stage.folder, name)))
            await async_wait_until(lambda: manager.stats().waiting == len(calls))
        stage.let_go()
        await asyncio.gather(first, *calls)
        assert stage.begun() == ["first", *names]

    with kind.running() as manager:
        asyncio.run(main())


def test_a_cancelled_call_is_given_up_at_once_and_its_capacity_comes_back(
    kind: Kind, stage: Stage, loop_runner: LoopRunner
) -> None:
    async def main() -> int | None:
        call = asyncio.create_task(manager.run(jobs.hold_worker, stage.folder, "held"))
        await stage.wait_begun_async("held")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        if kind.flags.supports_kill:
            await async_wait_until(lambda: not process_exists(stage.pid("held")))
        else:
            stage.let_go()
        return await manager.run(jobs.add, 1)

    with kind.running() as manager:
        assert loop_runner(main()) == 1
        wait_all_idle(manager)
        stats = manager.stats()
        assert (stats.calls_abandoned, stats.workers_killed, stats.workers_crashed) == (1, 1, 0)


def test_a_call_that_is_cancelled_while_it_waits_is_never_begun(kind: Kind, stage: Stage) -> None:
    async def main() -> None:
        first = asyncio.create_task(manager.run(jobs.hold, stage.folder, "first"))
        await stage.wait_begun_async("first")
        second = asyncio.create_task(manager.run(jobs.begin, stage.folder, "second"))
        third = asyncio.create_task(manager.run(jobs.begin, stage.folder, "third"))
        await async_wait_until(lambda: manager.stats().waiting == 2)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert manager.stats().waiting == 1
        stage.let_go()
        await asyncio.gather(first, third)
        assert stage.begun() == ["first", "third"]

    with kind.running() as manager:
        asyncio.run(main())
        assert manager.stats().workers_killed == 0


def test_a_call_ends_at_its_call_timeout(kind: Kind, stage: Stage) -> None:
    async def main() -> None:
        with pytest.raises(CallTimeoutError, match=r"tests\.jobs\.hold.*0\.1 s") as raised:
            await manager.options(call_timeout=0.1).run(jobs.hold, stage.folder, "async")
        assert raised.value.timeout == 0.1
        assert raised.value.function == "tests.jobs.hold"

    with kind.running() as manager:
        asyncio.run(main())
        if not kind.flags.supports_kill:
            stage.let_go("async")
        with pytest.raises(CallTimeoutError), kind.time_runs_out(stage, "blocking"):
            manager.options(call_timeout=0.1).run_sync(jobs.hold, stage.folder, "blocking")
        stage.let_go()
        assert manager.options(call_timeout=20).run_sync(jobs.add, 1) == 1
        wait_until(lambda: manager.stats().workers_killed == 2)


def test_the_managers_call_timeout_holds_where_a_call_has_none_of_its_own(
    kind: Kind, stage: Stage
) -> None:
    with kind.running(call_timeout=0.1) as manager:
        with pytest.raises(CallTimeoutError), kind.time_runs_out(stage, "one"):
            manager.run_sync(jobs.hold, stage.folder, "one")
        stage.let_go("one")
        with manager.lease_sync() as lease:
            with pytest.raises(CallTimeoutError), kind.time_runs_out(stage, "two"):
                lease.run_sync(jobs.hold, stage.folder, "two")
            stage.let_go("two")
            stage.let_go("three")
            assert lease.options(call_timeout=20).run_sync(jobs.hold, stage.folder, "three")


def test_who_waits_too_long_for_a_worker_leaves_the_line(kind: Kind, stage: Stage) -> None:
    async def main() -> None:
        first = asyncio.create_task(manager.run(jobs.hold, stage.folder, "first"))
        await stage.wait_begun_async("first")
        with pytest.raises(LeaseTimeoutError, match=r"within 0\.05 s") as raised:
            await manager.options(timeout=0.05).run(jobs.begin, stage.folder, "late")
        assert raised.value.waited == 0.05
        assert raised.value.waiting == 0
        assert isinstance(raised.value, TimeoutError)
        with pytest.raises(LeaseTimeoutError):
            await manager.acquire(timeout=0.05)
        with pytest.raises(LeaseTimeoutError):
            await asyncio.to_thread(
                manager.options(timeout=0.05).run_sync, jobs.begin, stage.folder, "late"
            )
        with pytest.raises(LeaseTimeoutError):
            await asyncio.to_thread(manager.acquire_sync, timeout=0.05)
        assert manager.stats().waiting == 0
        stage.let_go()
        assert await first == "first"

    with kind.running() as manager:
        asyncio.run(main())
        assert manager.run_sync(jobs.begin, stage.folder, "last") == "last"
        assert stage.begun() == ["first", "last"]


def test_beyond_max_waiting_callers_are_turned_away(kind: Kind, stage: Stage) -> None:
    async def main() -> None:
        held = asyncio.create_task(manager.run(jobs.hold, stage.folder, "held"))
        await stage.wait_begun_async("held")
        waiting = asyncio.create_task(manager.run(jobs.begin, stage.folder, "waiting"))
        await async_wait_until(lambda: manager.stats().waiting == 1)
        with pytest.raises(LeaseUnavailableError, match="max_waiting=1") as raised:
            await manager.run(jobs.begin, stage.folder, "too many")
        assert raised.value.waiting == 1
        with pytest.raises(LeaseUnavailableError, match="wait=False"):
            await manager.acquire(wait=False)
        stage.let_go()
        await asyncio.gather(held, waiting)
        assert manager.stats().rejected == 2

    with kind.running(max_waiting=1) as manager:
        asyncio.run(main())
        assert stage.begun() == ["held", "waiting"]
