"""``pools``: one manager per alias for everybody, started at first use, stopped at the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from leasepool_django import (
    LeasePoolNotStartedError,
    UnknownAliasError,
    WorkerStartError,
    pools,
    run_in_pool,
    run_in_pool_sync,
)
from leasepool_django.handler import AliasManager, Pools
from tests.django_jobs import Gate, double, gates, through_gate
from tests.waiting import async_wait_until, wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

    from tests.conftest import LoopRunner

ROOT = Path(__file__).parents[1]
THREADS = {"BACKEND": "thread", "WORKERS_PER_POOL": 2}


@pytest.fixture(autouse=True)
def thread_pools(settings: Settings) -> Iterator[None]:
    """Two aliases whose workers are threads; the setting's change makes the pools anew."""
    settings.LEASEPOOL = {"default": THREADS, "reports": THREADS}
    yield
    pools.reset()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = gates["test"] = Gate()
    yield gate
    gate.open.set()
    del gates["test"]


# -- a mapping ------------------------------------------------------------------------------------


def test_pools_map_aliases_to_managers_without_starting_any() -> None:
    assert list(pools) == ["default", "reports"]
    assert len(pools) == 2
    assert "reports" in pools
    assert "other" not in pools
    assert pools.get("other") is None
    assert pools["reports"] is pools["reports"]
    assert pools["reports"].alias == "reports"
    assert pools["reports"].name == "leasepool-reports"
    assert not any(manager.started for manager in pools.values())
    assert repr(pools) == "<Pools: default, reports; running: >"


def test_pools_are_one_service_and_not_what_they_contain() -> None:
    other = Pools()
    assert pools == pools  # noqa: PLR0124 - the comparison is tested
    assert pools != other
    assert pools != dict(pools)
    assert len({pools, other, pools}) == 2


def test_what_is_not_configured_yet_can_be_shown() -> None:
    assert repr(Pools()) == "<Pools: not configured yet>"


def test_an_unknown_alias_names_the_known_ones() -> None:
    with pytest.raises(UnknownAliasError) as raised:
        pools["report"]
    assert str(raised.value) == (
        "There is no pool alias 'report'. settings.LEASEPOOL has 'default', 'reports'."
    )
    assert raised.value.alias == "report"
    assert isinstance(raised.value, KeyError)


def test_mistakes_in_the_settings_show_at_first_use(settings: Settings) -> None:
    settings.LEASEPOOL = {"default": {"MAX_POOLS": 0}}
    with pytest.raises(ImproperlyConfigured, match="MAX_POOLS"):
        pools["default"]
    settings.LEASEPOOL = {
        "default": {**THREADS, "OPTIONS": {"initializer": "tests.no_such_module.f"}}
    }
    with pytest.raises(ImproperlyConfigured, match=r"LEASEPOOL\['default'\].*no_such_module"):
        pools["default"]


# -- the first use --------------------------------------------------------------------------------


def test_the_first_use_starts_the_manager(loop_runner: LoopRunner) -> None:
    assert loop_runner(run_in_pool(double, 21)) == 42
    assert pools["default"].started
    assert not pools["reports"].started


def test_the_first_blocking_use_starts_the_manager() -> None:
    assert run_in_pool_sync(double, 21) == 42
    assert pools["default"].started


def test_a_lease_starts_the_manager(loop_runner: LoopRunner) -> None:
    async def use() -> int:
        async with pools["reports"].lease() as lease:
            return await lease.run(double, 4)

    assert loop_runner(use()) == 8
    with pools["default"].lease_sync() as lease:
        assert lease.run_sync(double, 3) == 6


def test_one_manager_serves_loops_that_come_and_go() -> None:
    manager = pools["default"]
    assert [asyncio.run(run_in_pool(double, number)) for number in range(5)] == [0, 2, 4, 6, 8]
    assert manager.stats().workers_started == 2


def test_a_crowd_of_first_users_starts_once() -> None:
    users = 8
    barrier = threading.Barrier(users)

    def use(number: int) -> int:
        barrier.wait(10)
        if number % 2:
            return run_in_pool_sync(double, number)

        async def several() -> int:
            return sum(await asyncio.gather(*(run_in_pool(double, number) for _ in range(3))))

        return asyncio.run(several())

    with ThreadPoolExecutor(users) as executor:
        results = list(executor.map(use, range(users)))
    assert results == [0, 2, 12, 6, 24, 10, 36, 14]
    assert pools["default"].stats().workers_started == 2


def test_a_first_user_who_leaves_does_not_stop_the_start_for_others(
    settings: Settings, gate: Gate
) -> None:
    initializer = {"initializer": through_gate, "initargs": ("test",)}
    settings.LEASEPOOL = {"default": {**THREADS, "OPTIONS": initializer}}

    async def use() -> int:
        first = asyncio.create_task(run_in_pool(double, 1))
        await async_wait_until(lambda: gate.entered.acquire(blocking=False))
        second = asyncio.create_task(run_in_pool(double, 2))
        await asyncio.sleep(0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        gate.open.set()
        return await second

    assert asyncio.run(use()) == 4


def test_a_failed_start_is_the_error_of_who_asked(settings: Settings) -> None:
    settings.LEASEPOOL = {
        "default": {**THREADS, "OPTIONS": {"initializer": "tests.django_jobs.refuse_to_start"}}
    }
    for _ in range(2):
        with pytest.raises(WorkerStartError):
            run_in_pool_sync(double, 1)
    assert not pools["default"].started


# -- all together ---------------------------------------------------------------------------------


def test_all_start_and_stop_together(loop_runner: LoopRunner) -> None:
    async def live() -> None:
        await pools.start_all()
        assert all(manager.started for manager in pools.values())
        assert repr(pools) == "<Pools: default, reports; running: default, reports>"
        await pools.start_all()
        await pools.stop_all()
        assert not any(manager.started for manager in pools.values())
        await pools.stop_all()

    loop_runner(live())


def test_all_start_and_stop_together_in_blocking_code() -> None:
    pools.start_all_sync()
    assert all(manager.started for manager in pools.values())
    pools.stop_all_sync()
    assert not any(manager.started for manager in pools.values())


def failing_alias(**more: Any) -> dict[str, Any]:
    initializer = {"initializer": "tests.django_jobs.refuse_to_start"}
    return {**THREADS, "OPTIONS": initializer, **more}


def test_one_that_fails_to_start_stops_the_others(
    settings: Settings, loop_runner: LoopRunner
) -> None:
    settings.LEASEPOOL = {"default": THREADS, "a": failing_alias(), "b": failing_alias()}
    with pytest.raises(WorkerStartError) as raised:
        loop_runner(pools.start_all())
    assert len(raised.value.__notes__) == 1
    assert raised.value.__notes__[0].startswith("'b' failed as well: WorkerStartError")
    assert not any(manager.started for manager in pools.values())
    assert loop_runner(run_in_pool(double, 1)) == 2  # no server shuts down


def test_one_that_fails_to_start_stops_the_others_in_blocking_code(settings: Settings) -> None:
    settings.LEASEPOOL = {"default": THREADS, "broken": failing_alias()}
    with pytest.raises(WorkerStartError):
        pools.start_all_sync()
    assert not pools["default"].started
    assert not pools.closed
    assert run_in_pool_sync(double, 1) == 2


def test_a_start_that_is_cancelled_leaves_nothing(settings: Settings, gate: Gate) -> None:
    initializer = {"initializer": through_gate, "initargs": ("test",)}
    settings.LEASEPOOL = {"default": THREADS, "slow": {**THREADS, "OPTIONS": initializer}}

    async def start() -> None:
        task = asyncio.create_task(pools.start_all())
        await async_wait_until(lambda: gate.entered.acquire(blocking=False))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(start())
    assert not any(manager.started for manager in pools.values())
    assert run_in_pool_sync(double, 1) == 2


@pytest.mark.parametrize(
    ("end", "said"), [(pools.reset, "were reset"), (pools.stop_all_sync, "shutting down")]
)
def test_what_is_ended_while_it_starts_does_not_run_on(
    end: Callable[[], None], said: str, monkeypatch: pytest.MonkeyPatch, loop_runner: LoopRunner
) -> None:
    """``end`` comes when the managers to start are chosen, and none runs that it could stop."""
    chosen = [pools["default"], pools["reports"]]
    start, start_sync = AliasManager.start, AliasManager.start_sync

    async def end_and_start(manager: AliasManager) -> None:
        end()
        await start(manager)

    def end_and_start_sync(manager: AliasManager) -> None:
        end()
        start_sync(manager)

    monkeypatch.setattr(AliasManager, "start", end_and_start)
    monkeypatch.setattr(AliasManager, "start_sync", end_and_start_sync)
    with pytest.raises(LeasePoolNotStartedError, match=said):
        loop_runner(pools.start_all())
    with pytest.raises(LeasePoolNotStartedError, match=said):
        pools.start_all_sync()
    assert not any(manager.started for manager in [*chosen, *pools.values()])


def test_after_the_end_nothing_starts_until_it_is_opened_again(loop_runner: LoopRunner) -> None:
    async def live() -> None:
        await pools.start_all()
        await pools.stop_all()
        with pytest.raises(LeasePoolNotStartedError, match="shutting down"):
            await run_in_pool(double, 1)
        await pools.start_all()
        assert await run_in_pool(double, 1) == 2

    loop_runner(live())
    pools.stop_all_sync()
    with pytest.raises(LeasePoolNotStartedError, match="shutting down"):
        run_in_pool_sync(double, 1)
    pools.reset()
    assert run_in_pool_sync(double, 2) == 4


def test_the_end_lets_running_calls_finish(gate: Gate, loop_runner: LoopRunner) -> None:
    async def live() -> str:
        call = asyncio.create_task(run_in_pool(through_gate, "test"))
        await async_wait_until(lambda: gate.entered.acquire(blocking=False))
        end = asyncio.create_task(pools.stop_all())
        await async_wait_until(lambda: not pools["default"].started)
        assert not end.done()
        gate.open.set()
        await end
        return await call

    assert loop_runner(live()) == "passed"


def test_the_end_comes_to_all_at_once_in_blocking_code(gate: Gate) -> None:
    pools.start_all_sync()
    with ThreadPoolExecutor(2) as threads:
        call = threads.submit(run_in_pool_sync, through_gate, "test")
        assert gate.entered.acquire(timeout=10)
        end = threads.submit(pools.stop_all_sync, grace=60)
        # The first alias drains for as long as its call runs, and the second is closed already.
        wait_until(lambda: pools["reports"].stats().state == "stopped")
        wait_until(lambda: pools["default"].stats().state == "stopping")
        assert not end.done()
        gate.open.set()
        end.result(10)
        assert call.result(10) == "passed"


def test_the_end_without_grace_does_not_wait(gate: Gate, loop_runner: LoopRunner) -> None:
    async def live() -> None:
        call = asyncio.create_task(run_in_pool(through_gate, "test"))
        await async_wait_until(lambda: gate.entered.acquire(blocking=False))
        await pools.stop_all(grace=0)
        with pytest.raises(LeasePoolNotStartedError):
            await call

    loop_runner(live())


def test_a_manager_that_starts_while_the_end_comes_is_stopped(
    settings: Settings, gate: Gate
) -> None:
    initializer = {"initializer": through_gate, "initargs": ("test",)}
    settings.LEASEPOOL = {"default": {**THREADS, "OPTIONS": initializer}}
    errors: list[BaseException] = []

    def use() -> None:
        try:
            run_in_pool_sync(double, 1)
        except LeasePoolNotStartedError as error:
            errors.append(error)

    user = threading.Thread(target=use)
    user.start()
    assert gate.entered.acquire(timeout=10)
    pools.stop_all_sync(grace=0)
    gate.open.set()
    user.join(10)
    assert len(errors) == 1
    assert not pools["default"].started


@pytest.mark.parametrize("kind", ["async", "blocking"])
@pytest.mark.parametrize("end", [pools.reset, pools.stop_all_sync])
def test_a_start_that_nobody_could_see_when_the_end_came_is_undone(
    end: Callable[[], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = pools["default"]
    start_sync, start = manager.start_sync, manager.start

    def late_start_sync() -> None:
        end()
        start_sync()

    async def late_start() -> None:
        end()
        await start()

    monkeypatch.setattr(manager, "start_sync", late_start_sync)
    monkeypatch.setattr(manager, "start", late_start)
    if kind == "async":
        with pytest.raises(LeasePoolNotStartedError):
            asyncio.run(manager.run(double, 1))
    else:
        with pytest.raises(LeasePoolNotStartedError):
            manager.run_sync(double, 1)
    assert not manager.started


def test_an_end_that_fails_for_one_is_tried_for_all_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pools.start_all_sync()

    def fail(*, grace: float | None = None) -> None:
        raise OSError("stuck")

    with monkeypatch.context() as patch:
        patch.setattr(pools["default"], "stop_sync", fail)
        with pytest.raises(OSError, match="stuck"):
            pools.stop_all_sync()
        assert not pools["reports"].started
    pools.stop_all_sync()
    assert not pools["default"].started
