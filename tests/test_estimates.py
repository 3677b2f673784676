"""How long a caller would have to wait, as it is told."""

from __future__ import annotations

import asyncio
import time

import pytest

from leasepool_django import LeaseTimeoutError, LeaseUnavailableError
from tests import jobs
from tests.managers import running
from tests.stage import Stage
from tests.waiting import async_wait_until


def test_a_refusal_says_how_long_the_wait_would_be(stage: Stage) -> None:
    """For a ``Retry-After`` header."""

    async def main() -> None:
        await manager.run(jobs.pause, 0.2)
        held = asyncio.create_task(manager.run(jobs.hold, stage.folder, "held"))
        await stage.wait_begun_async("held")
        before = manager.estimated_wait()
        waiting = asyncio.create_task(manager.run(jobs.add, 1))
        await async_wait_until(lambda: manager.stats().waiting == 1)
        with pytest.raises(LeaseUnavailableError) as refused:
            await manager.acquire(wait=False)
        with pytest.raises(LeaseTimeoutError) as late:
            await manager.options(timeout=0.01).run(jobs.add, 1)
        for error in (refused.value, late.value):
            assert error.retry_after is not None
            # The one in line comes on top.
            assert error.retry_after >= manager.stats().mean_call_seconds >= 0.2
        assert before > 0
        stage.let_go("held")
        await asyncio.gather(waiting, held)

    with running() as manager:
        asyncio.run(main())


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("leased", [True, False])
def test_the_expected_wait_is_about_the_wait_there_is(
    leased: bool,  # noqa: FBT001 - parameters of the test
    first: bool,  # noqa: FBT001
    ahead: int,
) -> None:
    """Of calls as long as each other, and of leases held as long; also when none has ended yet."""
    seconds = 0.4

    async def work() -> None:
        if not leased:
            await manager.run(jobs.pause, seconds)
            return
        async with manager.lease() as lease:
            for _ in range(4):
                await lease.run(jobs.pause, seconds / 4)

    async def trial() -> tuple[float, float]:
        if not first:
            await asyncio.gather(work(), work())
        workers = 1 if leased else 2
        working = [asyncio.create_task(work()) for _ in range(workers + ahead)]
        await async_wait_until(lambda: manager.stats().waiting == ahead)
        await asyncio.sleep(seconds / 2)
        expected = manager.estimated_wait()
        begin = time.monotonic()
        await asyncio.create_task(work())
        waited = time.monotonic() - begin - seconds
        await asyncio.gather(*working)
        return waited, expected

    def is_right(waited: float, expected: float) -> bool:
        if first and ahead:
            return expected >= seconds / 4  # of those in line nothing is known yet
        return waited / 3 < expected < waited * 3

    trials: list[tuple[float, float]] = []
    # The machine may stand still for as long as a trial takes.
    while not (trials and is_right(*trials[-1])) and len(trials) < 3:
        with running(2) as manager:
            trials.append(asyncio.run(trial()))
    assert is_right(*trials[-1]), trials
