"""Callers of every kind: tasks on loops that last and on loops that are closed, and threads.

Each makes one call after the other, chosen by a random generator of its own, until told to stop,
and tells the ledger what it asked for and what it got.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from leasepool_django import ExecutorLease
from leasepool_django.exceptions import LeaseUnavailableError
from tests.chaos.ledger import Kind
from tests.chaos.script import LEASE_EVERY, Call, LeasePlan, Script, World, caller_number

__all__ = ["lasting_loop", "passing_loops", "thread_of_calls"]


# --- on event loops -------------------------------------------------------------------------------


def lasting_loop(
    world: World, name: str, new_event_loop: Callable[[], asyncio.AbstractEventLoop], tasks: int
) -> None:
    """A thread with one event loop, on which so many tasks make calls until told to stop."""

    async def all_tasks() -> None:
        await asyncio.gather(*(_turns(Script(world, f"{name}/{n}")) for n in range(tasks)))

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(all_tasks())


async def _turns(script: Script) -> None:
    while not script.world.stop.is_set():
        if script.random.randrange(LEASE_EVERY):
            call = script.next_call()
            manager = script.world.manager
            options = manager.options(timeout=call.timeout, call_timeout=call.call_timeout)
            await _ask(script, call, options.run)
        else:
            await _lease_turn(script)
    script.look_at_kept()


async def _ask(
    script: Script, call: Call, run: Callable[..., Awaitable[Any]], *, expiring: bool = False
) -> None:
    caller_number.set(call.number)
    timer = None
    if call.cancel_after is not None:
        task = asyncio.current_task()
        assert task is not None
        timer = asyncio.get_running_loop().call_later(call.cancel_after, task.cancel)
    try:
        answer: Any = await run(call.function, call.number, *call.arguments)
    except asyncio.CancelledError as error:
        if timer is None:
            script.world.ledger.abandon(call.number)
            raise  # the loop's end
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        answer = error
    except Exception as error:  # noqa: BLE001 - judged
        answer = error
    if timer is not None:
        timer.cancel()
    script.ended(call, answer, expiring=expiring)
    # The error's traceback leads here and to the lease: one that is dropped would be kept.
    del answer


async def _lease_turn(script: Script) -> None:
    """Lease some workers, and run several calls on them together."""
    world, plan = script.world, LeasePlan(script)
    try:
        lease = await world.manager.acquire(**plan.arguments)
    except LeaseUnavailableError as error:
        plan.refused(error)
        return
    world.count_lease(plan.how)
    if plan.how == "extended":
        await lease.extend(plan.extension)
    # A group refers to nothing when it is done: a lease that is dropped here is garbage at once.
    async with asyncio.TaskGroup() as group:
        for calls in plan.calls():
            group.create_task(_ask_in_turn(script, lease, calls, expiring=plan.expiring))
    if plan.how != "dropped":
        await lease.release()


async def _ask_in_turn(
    script: Script, lease: ExecutorLease, calls: Sequence[Call], *, expiring: bool
) -> None:
    for call in calls:
        run = lease.options(call_timeout=call.call_timeout).run
        await _ask(script, call, run, expiring=expiring)


def passing_loops(
    world: World, name: str, new_event_loop: Callable[[], asyncio.AbstractEventLoop], tasks: int
) -> None:
    """A thread that makes one loop after the other, and closes each under its callers.

    Every other one cancels its tasks before, as a server does; the rest are simply closed.
    """
    for number in _while_going(world):
        script = Script(world, f"{name}/{number}")
        loop = new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # tells of tasks that were pending
        mine: list[int] = []
        calls = [_few_turns(Script(world, f"{name}/{number}/{n}"), mine) for n in range(tasks)]
        running = [loop.create_task(coroutine) for coroutine in calls]
        try:
            loop.run_until_complete(asyncio.wait(running, timeout=script.random.uniform(0.01, 0.2)))
            if number % 2:
                for task in running:
                    task.cancel()
                loop.run_until_complete(asyncio.gather(*running, return_exceptions=True))
        finally:
            for open_number in mine:
                world.ledger.abandon(open_number)
                world.records.take(open_number)
            loop.close()


def _while_going(world: World) -> Iterator[int]:
    number = 0
    while not world.stop.is_set():
        yield number
        number += 1


async def _few_turns(script: Script, mine: list[int]) -> None:
    kinds = [Kind.QUICK, Kind.SLOW, Kind.SLOW, Kind.FAILING, Kind.LOGGING]
    for _ in range(200):
        call = script.make(script.random.choice(kinds))
        mine.append(call.number)
        await _ask(script, call, script.world.manager.run)
        mine.remove(call.number)


# --- blocking -------------------------------------------------------------------------------------


def thread_of_calls(world: World, name: str) -> None:
    """A thread that makes one blocking call after the other until told to stop."""
    script = Script(world, name)
    while not world.stop.is_set():
        if script.random.randrange(LEASE_EVERY):
            call = script.next_call(cancellable=False)
            options = world.manager.options(timeout=call.timeout, call_timeout=call.call_timeout)
            _ask_sync(script, call, options.run_sync)
        else:
            _lease_turn_sync(script)
    script.look_at_kept()


def _ask_sync(
    script: Script, call: Call, run: Callable[..., Any], *, expiring: bool = False
) -> None:
    caller_number.set(call.number)
    try:
        answer = run(call.function, call.number, *call.arguments)
    except Exception as error:  # noqa: BLE001 - judged
        answer = error
    script.ended(call, answer, expiring=expiring)
    del answer  # as in _ask


def _lease_turn_sync(script: Script) -> None:
    world, plan = script.world, LeasePlan(script)
    try:
        lease = world.manager.acquire_sync(**plan.arguments)
    except LeaseUnavailableError as error:
        plan.refused(error)
        return
    world.count_lease(plan.how)
    if plan.how == "extended":
        lease.extend_sync(plan.extension)
    try:
        if script.random.random() < 0.5:
            _use_executor(script, lease, expiring=plan.expiring)
        else:
            for calls in plan.calls(cancellable=False):
                for call in calls:
                    run = lease.options(call_timeout=call.call_timeout).run_sync
                    _ask_sync(script, call, run, expiring=plan.expiring)
    finally:
        if plan.how != "dropped":
            lease.release_sync()


def _use_executor(script: Script, lease: ExecutorLease, *, expiring: bool) -> None:
    """Some calls through the lease's executor; their threads have no context of a caller's."""
    kinds = [Kind.QUICK, Kind.QUICK, Kind.SLOW, Kind.LARGE, Kind.FAILING]
    calls = [script.make(script.random.choice(kinds)) for _ in range(script.random.randint(1, 8))]
    futures: list[Any] = []
    for call in calls:
        try:
            futures.append(lease.executor.submit(call.function, call.number, *call.arguments))
        except Exception as error:  # noqa: BLE001 - the lease has expired meanwhile; judged
            futures.append(error.with_traceback(None))
    for call, future in zip(calls, futures, strict=True):
        answer = future if isinstance(future, Exception) else _answer(future)
        script.ended(call, answer, expiring=expiring)


def _answer(future: Any) -> Any:
    error = future.exception()
    return future.result() if error is None else error
