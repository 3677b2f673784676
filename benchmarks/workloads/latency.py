"""Tiny calls one after the other, with everything pinned to one core.

Unpinned, the same code gives one of two very different figures: the scheduler puts both ends on
one core or on two.
"""

from __future__ import annotations

from statistics import median

from .. import floors, jobs
from ..contenders import Contender, Wanted
from ..measuring import Effort, Metric, percentile, timed_calls
from .group import SEQUENTIAL, Group


class Latency(Group):
    """The way of one call there and back."""

    name = "latency"
    title = "Tiny calls, one after the other"
    work = (
        "A function that returns its argument, awaited again and again by one caller; server, 2 "
        "workers and everything else pinned to one core. `run_in_pool` is called with a language "
        "and a time zone active that the worker must take over. The first lines are a forked child "
        "that blocks, with the pickling of this package and nothing else: over "
        "`multiprocessing.Pipe()`, which the goals compare with and which reads each message "
        "twice, its length first; and over a socket and over pipes, one call to send and one to "
        "receive."
    )
    metrics = (Metric("p50", "median", "µs"), Metric("p99", "99th percentile", "µs"))
    contenders = SEQUENTIAL
    quick = ("lease", "run", "django", "stdlib")
    floors = {
        "blocking pipe": floors.blocking_pipe,
        "socketpair": floors.one_socket,
        "os.pipe, without frames": floors.unframed_pipe,
    }
    floor_titles = {
        "blocking pipe": "blocking pipe (`multiprocessing.Pipe`)",
        "socketpair": "socketpair, one send and one recv",
    }
    pinned = True

    def wanted(self) -> Wanted:
        return Wanted(translated=True)

    async def measure(self, contender: Contender, effort: Effort) -> dict[str, float]:
        async def call() -> None:
            await contender.run(jobs.tiny, 1)

        run = contender.run
        await timed_calls(call, seconds=0.5, at_most=500)
        durations = await timed_calls(
            lambda: run(jobs.tiny, 1), seconds=effort.pick(1.5, 0.4), at_least=20, at_most=20_000
        )
        return {"p50": 1e6 * median(durations), "p99": 1e6 * percentile(durations, 99)}


GROUPS = (Latency(),)
