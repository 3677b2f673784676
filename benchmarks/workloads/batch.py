"""A CPU-bound batch on all usable cores: how much faster than doing it serially."""

from __future__ import annotations

import asyncio
import os
import time
from statistics import median

from .. import floors, jobs
from ..contenders import Contender, Wanted
from ..measuring import Better, Effort, Metric
from .group import PEERS, Group

ROUNDS = 400_000  # of the loop in one call: some 20 ms
CALLS = 10  # for each core, in one turn


def _serial(calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        jobs.chunk(ROUNDS)
    return time.perf_counter() - begin


def _turns(effort: Effort) -> tuple[int, int]:
    """How many turns, and the calls of one."""
    return effort.pick(5, 2), CALLS * len(os.sched_getaffinity(0))


def bare(effort: Effort) -> dict[str, float]:
    """The batch in one process, against as many as there are cores, with nothing to send."""
    cores = len(os.sched_getaffinity(0))
    turns, calls = _turns(effort)
    ratios = []
    for _ in range(turns):
        serial = _serial(calls)
        ratios.append(serial / floors.share_out(calls, cores, lambda: jobs.chunk(ROUNDS)))
    return {"efficiency": median(ratios) / cores}


class Batch(Group):
    """All cores busy with one caller's work."""

    name = "batch"
    title = "CPU-bound batch on all cores"
    work = (
        "10 calls for each core, of some 20 ms of plain Python each, awaited together, on one "
        "worker for each core, after the same calls one after the other in one process; five times "
        "in turn, of which the median counts."
    )
    metrics = (Metric("efficiency", "speed-up ÷ cores", "×", Better.HIGHER),)
    contenders = ("lease", "run", *PEERS)
    quick = ("lease", "run")
    loops = ("asyncio",)
    floors = {"bare processes": bare}
    timeout = 120.0

    def wanted(self) -> Wanted:
        return Wanted(workers=len(os.sched_getaffinity(0)))

    async def measure(self, contender: Contender, effort: Effort) -> dict[str, float]:
        cores = len(os.sched_getaffinity(0))
        turns, calls = _turns(effort)
        run = contender.run
        await asyncio.gather(*(run(jobs.chunk, ROUNDS) for _ in range(2 * cores)))
        ratios = []
        for _ in range(turns):
            serial = _serial(calls)
            begin = time.perf_counter()
            await asyncio.gather(*(run(jobs.chunk, ROUNDS) for _ in range(calls)))
            ratios.append(serial / (time.perf_counter() - begin))
        return {"efficiency": median(ratios) / cores}


GROUPS = (Batch(),)
