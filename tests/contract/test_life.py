"""Start, stop and failure of a manager, on every backend."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from leasepool_django import (
    LeasePoolNotStartedError,
    WorkerCrashedError,
    WorkerStartError,
)
from tests import jobs
from tests.conftest import LoopRunner
from tests.contract.conftest import ISOLATED, KINDS, Kind
from tests.managers import wait_all_idle
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until


def test_start_and_stop_may_be_repeated(kind: Kind, loop_runner: LoopRunner) -> None:
    manager = kind.manager()

    async def main() -> None:
        with pytest.raises(LeasePoolNotStartedError, match="has not been started"):
            await manager.run(jobs.add, 1)
        await manager.start()
        await manager.start()
        assert manager.stats().state == "running"
        assert await manager.run(jobs.add, 1) == 1
        await manager.stop()
        await manager.stop()
        assert manager.stats().state == "stopped"
        with pytest.raises(LeasePoolNotStartedError, match="has been stopped"):
            await manager.acquire()

    loop_runner(main())
    manager.start_sync()
    assert manager.run_sync(jobs.add, 2) == 2
    manager.stop_sync()
    with pytest.raises(LeasePoolNotStartedError):
        manager.run_sync(jobs.add, 1)
    with pytest.raises(LeasePoolNotStartedError):
        manager.acquire_sync()


def test_a_stop_lets_running_calls_finish_and_refuses_the_rest(kind: Kind, stage: Stage) -> None:
    async def main() -> None:
        running = asyncio.create_task(manager.run(jobs.hold, stage.folder, "running"))
        await stage.wait_begun_async("running")
        waiting = asyncio.create_task(manager.run(jobs.begin, stage.folder, "waiting"))
        leasing = asyncio.create_task(manager.acquire())
        await async_wait_until(lambda: manager.stats().waiting == 2)
        stopping = asyncio.create_task(manager.stop())
        for refused in (waiting, leasing):
            with pytest.raises(LeasePoolNotStartedError, match="is stopping"):
                await refused
        with pytest.raises(LeasePoolNotStartedError, match="is stopping"):
            await manager.run(jobs.begin, stage.folder, "late")
        with pytest.raises(LeasePoolNotStartedError, match="is stopping"):
            await manager.start()
        assert manager.stats().state == "stopping"
        assert not stopping.done()
        stage.let_go()
        assert await running == "running"
        await stopping

    with kind.running() as manager:
        asyncio.run(main())
        assert manager.stats().state == "stopped"
        assert stage.begun() == ["running"]


def test_a_stop_without_grace_ends_running_calls(kind: Kind, stage: Stage) -> None:
    async def main() -> None:
        call = asyncio.create_task(manager.run(jobs.hold, stage.folder, "call"))
        lease = await manager.acquire(workers=1)
        leased = asyncio.create_task(lease.run(jobs.hold, stage.folder, "leased"))
        await stage.wait_begun_async("call", "leased")
        waiting = asyncio.create_task(lease.run(jobs.begin, stage.folder, "waiting"))
        await async_wait_until(lambda: manager.stats().leases[0].waiting == 1)
        await manager.stop(grace=0)
        for ended in (call, leased, waiting):
            with pytest.raises(LeasePoolNotStartedError, match="stop"):
                await ended

    with kind.running(2) as manager:
        asyncio.run(main())
        assert manager.stats().state == "stopped"
        assert sorted(stage.begun()) == ["call", "leased"]


def test_a_second_stop_may_shorten_the_grace_of_the_first(kind: Kind, stage: Stage) -> None:
    with ThreadPoolExecutor() as threads, kind.running(shutdown_grace_seconds=600) as manager:
        call = threads.submit(manager.run_sync, jobs.hold, stage.folder, "call")
        stage.wait_begun("call")
        patient = threads.submit(manager.stop_sync)
        wait_until(lambda: manager.stats().state == "stopping")
        manager.stop_sync(grace=0)
        patient.result()
        if not kind.flags.supports_prompt_deadlines:
            stage.let_go()
        with pytest.raises(LeasePoolNotStartedError, match="stopped before this call had ended"):
            call.result()


def test_an_initializer_that_fails_fails_the_start_and_leaves_nothing(
    kind: Kind, tmp_path: Path, loop_runner: LoopRunner
) -> None:
    needed = tmp_path / "needed"
    manager = kind.manager(2, initializer=jobs.need, initargs=(needed,))

    async def main() -> None:
        with pytest.raises(WorkerStartError) as raised:
            await manager.start()
        assert raised.value.traceback_text
        assert not manager.started
        assert manager.total_count == 0
        with pytest.raises(LeasePoolNotStartedError, match="could not be started"):
            await manager.run(jobs.add, 1)

    loop_runner(main())
    with pytest.raises(WorkerStartError):
        manager.start_sync()
    needed.touch()
    manager.start_sync()
    assert manager.run_sync(jobs.add, 1) == 1
    manager.stop_sync()


@pytest.mark.parametrize("name", ISOLATED)
def test_a_crash_costs_one_call_where_calls_are_isolated(name: str, stage: Stage) -> None:
    async def main() -> None:
        other = asyncio.create_task(manager.run(jobs.hold, stage.folder, "other"))
        await stage.wait_begun_async("other")
        with pytest.raises(WorkerCrashedError) as raised:
            await manager.run(jobs.die, 7)
        assert raised.value.function == "tests.jobs.die"
        assert raised.value.exitcode == 7
        stage.let_go()
        assert await other == "other"

    with KINDS[name].running(2) as manager:
        asyncio.run(main())
        with pytest.raises(WorkerCrashedError):
            manager.run_sync(jobs.die, 7)
        wait_all_idle(manager)
        assert manager.run_sync(jobs.add, 1) == 1
        assert manager.stats().workers_crashed == 2


def test_the_records_of_workers_arrive_where_they_are_forwarded(
    kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    if not kind.flags.supports_log_forwarding:
        with pytest.raises(ValueError, match="forward_process_logs=True"):
            kind.manager(forward_process_logs=True)
        return
    with kind.running(forward_process_logs=True) as manager:
        assert manager.run_sync(jobs.log, "from afar") == "from afar"
    assert ("tests.jobs", logging.WARNING, "from afar") in caplog.record_tuples


def test_an_option_that_the_backend_does_not_know_is_named(kind: Kind) -> None:
    with pytest.raises(TypeError, match="'colour'"):
        kind.manager(colour="red")
    if not kind.flags.supports_hooks:
        with pytest.raises(TypeError, match="'hooks'"):
            kind.manager(hooks="tests.jobs")
