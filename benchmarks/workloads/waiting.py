"""Callers by the thousand in line for one worker: what one grant costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

from .. import jobs
from ..contenders import Contender, Entry, OneShot, Wanted
from ..fifo import Fifo
from ..measuring import Effort, Metric
from .group import PEERS, Group

FEW = 100
MANY = 10_000
LINES = 3
ENOUGH = 20.0  # seconds after which a contender that needs so long gets no further line


class Waiting(Group):
    """The line, short and long."""

    name = "waiting"
    title = "10,000 callers waiting in line"
    work = (
        "One worker is occupied while callers join the line, each with a tiny call. Then the "
        "worker is freed: microseconds per call until the last has its answer, with 100 and with "
        "10,000 in line, in turns, the medians of both. For this package also with callers that "
        "wait for a lease, make the call in it and release it."
    )
    metrics = (
        Metric("few", "100 waiting, a call", "µs"),
        Metric("many", "10,000 waiting, a call", "µs"),
        Metric("growth", "10,000 ÷ 100", "×"),
        Metric("lease_growth", "leases, 10,000 ÷ 100", "×"),
    )
    contenders = ("run", *PEERS)
    quick = ("run",)
    quick_loops = ("asyncio",)
    timeout = 120.0

    def wanted(self) -> Wanted:
        return Wanted(workers=1)

    def refusal(self, entry: Entry) -> str | None:
        most = entry.kind.most_waiting
        if most is not None and most < MANY:
            return f"blocks the event loop when more than {most:,} calls wait"
        return None

    async def measure(self, contender: Contender, effort: Effort) -> dict[str, float]:
        run = contender.run

        async def call() -> None:
            await run(jobs.tiny, 1)

        many = effort.pick(MANY, MANY // 4)
        few_cost, many_cost = await _compare(run, call, many)
        figures = {
            "few": 1e6 * few_cost,
            "many": 1e6 * many_cost,
            "growth": many_cost / few_cost,
        }
        if isinstance(contender, OneShot):
            manager = contender.manager

            async def leased() -> None:
                async with manager.lease(workers=1) as lease:
                    await lease.run(jobs.tiny, 1)

            few_cost, many_cost = await _compare(run, leased, many)
            figures["lease_growth"] = many_cost / few_cost
        return figures


async def _compare(
    run: Callable[..., Awaitable[Any]], call: Callable[[], Awaitable[None]], many: int
) -> tuple[float, float]:
    """Seconds per call with few and with many in line, the medians of several lines of each."""
    end = time.monotonic() + ENOUGH
    await _drain(run, call, FEW)
    few: list[float] = []
    long: list[float] = []
    for _ in range(LINES):
        few += [await _drain(run, call, FEW) for _ in range(20 // LINES)]
        long.append(await _drain(run, call, many))
        if time.monotonic() >= end:
            break
    return median(few), median(long)


async def _drain(
    run: Callable[..., Awaitable[Any]], call: Callable[[], Awaitable[None]], waiting: int
) -> float:
    """Seconds per call from freeing the worker to the end of the line."""
    loop = asyncio.get_running_loop()

    async def hold() -> None:
        await run(jobs.hold, begun.path, free.path)

    async def waiter() -> None:
        await call()

    with Fifo() as begun, Fifo() as free:
        held = loop.create_task(hold())
        await begun.received()
        tasks = [loop.create_task(waiter()) for _ in range(waiting)]
        # All have made their calls once the loop has come round; a second time for those that
        # hand a call on before they wait.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        begin = time.perf_counter()
        free.send(1)
        await asyncio.gather(held, *tasks)
        return (time.perf_counter() - begin) / waiting


GROUPS = (Waiting(),)
