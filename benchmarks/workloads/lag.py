"""How long the event loop is away while calls are in flight: what every other request feels."""

from __future__ import annotations

import asyncio
import time

from .. import jobs
from ..contenders import Contender
from ..measuring import Effort, Metric, percentile
from .group import PEERS, Group

IN_FLIGHT = 64
TICK = 0.002


class Lag(Group):
    """A ticker beside 64 calls in flight."""

    name = "lag"
    title = "Event-loop lag with 64 calls in flight, 2 workers"
    work = (
        "A task sleeps for 2 ms again and again; what it sleeps longer is lag. 99th percentile, "
        "first with nothing else on the loop, then with 64 tasks that await tiny calls, then with "
        "64 that await calls of 5 ms of CPU time, on 2 workers. Allowed is twice the idle loop's "
        "lag + 1 ms."
    )
    metrics = (
        Metric("idle", "idle loop, p99", "ms"),
        Metric("tiny", "tiny calls, p99", "ms"),
        Metric("busy", "5 ms calls, p99", "ms"),
        Metric("tiny_allowed", "tiny calls ÷ allowed", "×"),
        Metric("busy_allowed", "5 ms calls ÷ allowed", "×"),
    )
    contenders = ("run", *PEERS)
    quick = ("run",)
    quick_loops = ("asyncio",)

    async def measure(self, contender: Contender, effort: Effort) -> dict[str, float]:
        seconds = effort.pick(2.5, 1.0)
        await asyncio.gather(*(contender.run(jobs.spin, 0.001) for _ in range(4)))
        idle = await _lag(seconds)
        tiny = await _lag_beside(contender, seconds, jobs.tiny, 1)
        busy = await _lag_beside(contender, seconds, jobs.spin, 0.005)
        allowed = 2 * idle + 1
        return {
            "idle": idle,
            "tiny": tiny,
            "busy": busy,
            "tiny_allowed": tiny / allowed,
            "busy_allowed": busy / allowed,
        }


async def _lag(seconds: float) -> float:
    """Tick for ``seconds``; the 99th percentile of the lag, in milliseconds."""
    clock = time.perf_counter
    lags: list[float] = []
    end = clock() + seconds
    while True:
        begin = clock()
        await asyncio.sleep(TICK)
        now = clock()
        lags.append(1e3 * (now - begin - TICK))
        if now >= end:
            return max(0.0, percentile(lags, 99))


async def _lag_beside(contender: Contender, seconds: float, fn: object, argument: float) -> float:
    done = False

    async def caller() -> None:
        while not done:
            await contender.run(fn, argument)

    callers = [asyncio.create_task(caller()) for _ in range(IN_FLIGHT)]
    try:
        return await _lag(seconds)
    finally:
        done = True
        await asyncio.gather(*callers)


GROUPS = (Lag(),)
