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
    taken = median(
        floors.share_out(calls, WORKERS, lambda: jobs.spin(SECONDS)) for _ in range(_turns(effort))
    )
    return {"of_ideal": taken / (calls * SECONDS / WORKERS)}


def _turns(effort: Effort) -> int:
    return effort.pick(3, 1)


class Fairness(Group):
    """More callers than workers, each wanting 5 ms of a core at a time."""

    name = "fairness"
    title = "600 × 5 ms from 64 callers, 2 workers"
    work = (
        "64 callers share 600 calls that use 5 ms of CPU time each, on 2 workers. Ideal is 600 × "
        "5 ms ÷ 2 = 1.5 s; the slowest call is compared with the median call, both with their "
        "wait. Three times, of which the median counts."
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
        figures = [await _share(contender, calls) for _ in range(_turns(effort))]
        return {metric.name: median(one[metric.name] for one in figures) for metric in self.metrics}


async def _share(contender: Contender, calls: int) -> dict[str, float]:
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
