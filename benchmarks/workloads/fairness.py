"""600 calls of 5 ms from 64 callers on two workers: how close to ideal, and how even."""

from __future__ import annotations

import asyncio
import time
from statistics import median

from .. import floors, jobs
from ..contenders import Contender
from ..measuring import Effort, Metric
from .group import CONCURRENT, Group

SECONDS = 0.005
CALLERS = 64
WORKERS = 2


def bare(effort: Effort) -> dict[str, float]:
    """The same work done by two processes that were given their halves beforehand."""
    calls = effort.pick(600, 200)
    taken = floors.share_out(calls, WORKERS, lambda: jobs.spin(SECONDS))
    return {"of_ideal": taken / (calls * SECONDS / WORKERS)}


class Fairness(Group):
    """More callers than workers, each wanting 5 ms of a core at a time."""

    name = "fairness"
    title = "600 × 5 ms from 64 callers, 2 workers"
    work = (
        "64 callers share 600 calls that use 5 ms of CPU time each, on 2 workers. Ideal is 600 × "
        "5 ms ÷ 2 = 1.5 s; the slowest call is compared with the median call, both with their wait."
    )
    metrics = (
        Metric("of_ideal", "total ÷ ideal", "×"),
        Metric("slowest", "slowest ÷ median call", "×"),
    )
    contenders = CONCURRENT
    quick = ("run",)
    quick_loops = ("asyncio",)
    floors = {"two bare processes": bare}

    async def measure(self, contender: Contender, effort: Effort) -> dict[str, float]:
        calls = effort.pick(600, 200)
        await asyncio.gather(*(contender.run(jobs.spin, 0.001) for _ in range(2 * WORKERS)))
        left = calls
        durations: list[float] = []
        clock = time.perf_counter

        async def caller() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                begin = clock()
                await contender.run(jobs.spin, SECONDS)
                durations.append(clock() - begin)

        begin = clock()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        total = clock() - begin
        return {
            "of_ideal": total / (calls * SECONDS / WORKERS),
            "slowest": max(durations) / median(durations),
        }


GROUPS = (Fairness(),)
