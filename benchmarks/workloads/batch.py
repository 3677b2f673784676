"""A CPU-bound batch on all usable cores: how much faster than doing it serially."""

from __future__ import annotations

import asyncio
import os
import time

from .. import floors, jobs
from ..contenders import Contender, Wanted
from ..measuring import Better, Effort, Metric
from .group import PEERS, Group

ROUNDS = 400_000  # of the loop in one call: some 20 ms


def _sizes(effort: Effort) -> tuple[int, int]:
    cores = len(os.sched_getaffinity(0))
    return cores, cores * effort.pick(50, 12)


def _serial(calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        jobs.chunk(ROUNDS)
    return time.perf_counter() - begin


def bare(effort: Effort) -> dict[str, float]:
    """The batch in one process, against as many as there are cores, with nothing to send."""
    cores, calls = _sizes(effort)
    parallel = floors.share_out(calls, cores, lambda: jobs.chunk(ROUNDS))
    return {"efficiency": _serial(calls) / parallel / cores}


class Batch(Group):
    """All cores busy with one caller's work."""

    name = "batch"
    title = "CPU-bound batch on all cores"
    work = (
        "50 calls for each core, of some 20 ms of plain Python each, awaited together, on one "
        "worker for each core; and the same calls one after the other in one process."
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
        cores, calls = _sizes(effort)
        run = contender.run
        await asyncio.gather(*(run(jobs.chunk, ROUNDS) for _ in range(2 * cores)))
        serial = _serial(calls)
        begin = time.perf_counter()
        await asyncio.gather(*(run(jobs.chunk, ROUNDS) for _ in range(calls)))
        parallel = time.perf_counter() - begin
        return {"efficiency": serial / parallel / cores}


GROUPS = (Batch(),)
