"""Starting: the first call on a cold manager, and the next worker that is ready for Django."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import median
from typing import ClassVar

from .. import floors, jobs
from ..contenders import Contender, Entry, Wanted, make
from ..fifo import Fifo
from ..measuring import Effort, Metric, NotMeasuredError, run_async
from ..memory import private_memory
from .group import Figures, Group

SETTLED = 0.3  # seconds


class Start(Group):
    """From nothing to the first answer. Every cell is a process of its own, so each is cold."""

    name = "start"
    title = "First call on a cold manager, in a Django project"
    work = (
        "In a process in which Django is set up, as in a server: from starting 2 workers to the "
        "answer of a first call that uses a model. Contenders other than this package set Django "
        "up in each worker: by an initializer, or in the function where there is none. Five times, "
        "each in a new process, of which the median counts. The goal compares with peers that "
        "start workers by `spawn` or a fork server: one that forks the server itself (`fork`, the "
        "default of ProcessPoolExecutor before Python 3.14) is there at once, with copies of its "
        "threads' locks, its sockets and its database connections."
    )
    metrics = (Metric("first_answer", "start → first answer", "ms"),)
    processes = 5  # each can start cold only once
    # Not those that fork the server with its threads, locks and connections.
    peers = (
        "stdlib-spawn",
        "stdlib-forkserver",
        "stdlib-preload",
        "loky",
        "pebble-spawn",
        "pebble-forkserver",
        "anyio",
        "aiomultiprocess",
        "deadpool",
        "dask",
        "leasepool-forkserver",
    )
    contenders = ("django", "stdlib", *peers)
    quick = ("django", "stdlib-forkserver")
    quick_loops = ("asyncio",)

    def wanted(self) -> Wanted:
        return Wanted(django=True)

    def cell(self, contender: str, loop: str, effort: Effort) -> Figures:
        async def main() -> Figures:
            adapter = make(contender, self.wanted())
            jobs.set_up_django()
            begin = time.perf_counter()
            await adapter.start()
            try:
                await adapter.run(jobs.django_answer)
                taken = time.perf_counter() - begin
            finally:
                await adapter.stop()
            return {"first_answer": 1e3 * taken}

        return run_async(main, loop)

    async def measure(self, contender: Contender, effort: Effort) -> Figures:
        raise NotImplementedError("a cold start is measured around start()")


def kill_and_fork(effort: Effort) -> Figures:
    """Killing a bare child, waiting for its end, forking another and having its answer."""
    return {"next_worker": floors.fresh_fork(effort)}


class NextWorker(Group):
    """Workers that are added one by one while all others are busy."""

    name = "workers"
    title = "The next Django-ready worker, and its memory"
    work = (
        "1 worker, and room for 5 more. All workers are occupied, and one more call is made, which "
        "uses a model: milliseconds until its answer, from a worker that had to be started for it; "
        "an answer from a process that was there before the call does not count. Then the memory "
        "that belongs to this worker alone."
    )
    metrics = (
        Metric("next_worker", "next worker's first answer", "ms"),
        Metric("private", "private memory of a worker", "MB"),
    )
    contenders: ClassVar[tuple[str, ...]] = (
        "django",
        "stdlib-spawn",
        "stdlib-forkserver",
        "stdlib-preload",
        "loky",
        "pebble-forkserver",
        "anyio",
        "aiomultiprocess",
        "deadpool",
        "dask",
        "leasepool-forkserver",
    )
    quick = ("django",)
    loops = ("asyncio",)
    floors = {"kill and fork": kill_and_fork}
    WORKERS = 6

    def wanted(self) -> Wanted:
        return Wanted(workers=self.WORKERS, django=True, growing=True)

    def refusal(self, entry: Entry) -> str | None:
        return None if entry.kind.grows else "starts all its workers at once"

    async def measure(self, contender: Contender, effort: Effort) -> Figures:
        run = contender.run
        holds: list[asyncio.Task[None]] = []
        durations: list[float] = []
        sizes: list[int] = []

        async def hold() -> None:
            await run(jobs.hold, begun.path, free.path)

        with Fifo() as begun, Fifo() as free:
            try:
                await run(jobs.django_answer)
                for _ in range(self.WORKERS - 1):
                    holds.append(asyncio.create_task(hold()))
                    await begun.received()
                    # A worker that is being started ahead of need is there afterwards.
                    await asyncio.sleep(SETTLED)
                    there = processes()
                    begin = time.perf_counter()
                    pid = await run(jobs.django_worker)
                    taken = time.perf_counter() - begin
                    if pid not in there:
                        durations.append(taken)
                        sizes.append(private_memory(pid))
            finally:
                free.send(len(holds))
                await asyncio.gather(*holds)
        if not durations:
            raise NotMeasuredError("starts workers ahead of need")
        return {"next_worker": 1e3 * median(durations), "private": median(sizes) / 1e6}


def processes() -> set[int]:
    """All processes of this machine."""
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}


class WithBallast(NextWorker):
    """The same with 400 MB in the process that workers are forked from."""

    name = "ballast"
    title = "The next Django-ready worker with 400 MB preloaded"
    work = (
        "As above, with a module preloaded that holds 400 MB of small objects. Only where a "
        "module can be loaded before workers are forked; elsewhere each worker would hold its own."
    )
    contenders: ClassVar[tuple[str, ...]] = ("django", "stdlib-preload")
    floors = {}

    def wanted(self) -> Wanted:
        return Wanted(workers=self.WORKERS, django=True, growing=True, ballast=True)


GROUPS = (Start(), NextWorker(), WithBallast())
