"""Tiny calls, 64 in flight at any time."""

from __future__ import annotations

import asyncio
import time

from .. import floors, jobs
from ..contenders import Contender
from ..measuring import Better, Effort, Metric
from .group import CONCURRENT, Group

IN_FLIGHT = 64


class Throughput(Group):
    """How many calls a second the server's loop gets done."""

    name = "throughput"
    title = "Tiny calls, 64 in flight, 2 workers"
    work = (
        "64 tasks, each awaiting one call after the other of a function that does nothing, on 2 "
        "workers. The first line is two forked children and a process that does nothing but send "
        "each its next call when it has answered: where one call at a time is with a worker, most "
        "of the time goes into waking it, and the server; this package sends a second one ahead."
    )
    metrics = (Metric("calls", "calls a second", "/s", Better.HIGHER),)
    contenders = CONCURRENT
    floors = {"two sockets": floors.two_sockets}
    floor_titles = {"two sockets": "two children, one call at a time each"}
    quick = ("lease", "run", "django", "anyio")

    async def measure(self, contender: Contender, effort: Effort) -> dict[str, float]:
        await calls_per_second(contender, 0.3)
        return {"calls": await calls_per_second(contender, effort.pick(2.0, 0.5))}


async def calls_per_second(contender: Contender, seconds: float) -> float:
    """Keep ``IN_FLIGHT`` calls in flight for ``seconds``; how many were done in one second."""
    run, clock = contender.run, time.perf_counter
    done = 0
    begin = clock()
    end = begin + seconds

    async def caller() -> None:
        nonlocal done
        while clock() < end:
            await run(jobs.tiny, 1)
            done += 1

    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    return done / (clock() - begin)


GROUPS = (Throughput(),)
