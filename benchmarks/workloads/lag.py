"""How long the event loop is away while calls are in flight: what every other request feels."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import time
from collections.abc import Coroutine

from .. import jobs
from ..contenders import Contender
from ..measuring import Effort, Metric, percentile
from .group import PEERS, Group

IN_FLIGHT = 64
TICK = 0.002  # seconds


class Lag(Group):
    """A sleeping task, and a kernel timer, beside 64 calls in flight."""

    name = "lag"
    title = "Event-loop lag with 64 calls in flight, 2 workers"
    work = (
        "How late the loop is for whatever else is on it: first alone, then beside 64 tasks that "
        "await tiny calls, then beside 64 that await calls of 5 ms of CPU time, on 2 workers; 99th "
        "percentiles. It is asked in two ways. *Sleep*: a task sleeps for 2 ms again and again; "
        "what it sleeps longer is lag, and allowed is twice the idle loop's lag + 1 ms. Loops "
        "round up to whole milliseconds when they wait, so beside the 5 ms calls this shows about "
        "1 ms, whoever makes them. *Event*: a timer of the kernel makes a descriptor readable "
        "every 2 ms, as a client's request would; the time until the loop has read it is lag."
    )
    metrics = (
        Metric("idle", "idle loop, sleep", "ms"),
        Metric("tiny", "tiny calls, sleep", "ms"),
        Metric("busy", "5 ms calls, sleep", "ms"),
        Metric("tiny_allowed", "tiny calls, sleep ÷ allowed", "×"),
        Metric("busy_allowed", "5 ms calls, sleep ÷ allowed", "×"),
        Metric("idle_event", "idle loop, event", "ms"),
        Metric("tiny_event", "tiny calls, event", "ms"),
        Metric("busy_event", "5 ms calls, event", "ms"),
    )
    contenders = ("run", "django", *PEERS)
    quick = ("run",)
    quick_loops = ("asyncio",)
    timeout = 90.0

    async def measure(self, contender: Contender, effort: Effort) -> dict[str, float]:
        seconds = effort.pick(2.0, 1.0)
        await asyncio.gather(*(contender.run(jobs.spin, 0.001) for _ in range(4)))
        figures: dict[str, float] = {}
        for suffix, lags in ("", of_sleep), ("_event", of_event):
            figures["idle" + suffix] = percentile(await lags(seconds), 99)
            for calls, fn, argument in ("tiny", jobs.tiny, 1), ("busy", jobs.spin, 0.005):
                found = await _beside(contender, fn, argument, lags(seconds))
                figures[calls + suffix] = percentile(found, 99)
        allowed = 2 * figures["idle"] + 1
        figures["tiny_allowed"] = figures["tiny"] / allowed
        figures["busy_allowed"] = figures["busy"] / allowed
        return figures


async def of_sleep(seconds: float) -> list[float]:
    """Sleep for ``TICK`` again and again, for ``seconds``; the lags in milliseconds."""
    clock = time.perf_counter
    lags: list[float] = []
    end = clock() + seconds
    while True:
        begin = clock()
        await asyncio.sleep(TICK)
        now = clock()
        lags.append(max(0.0, 1e3 * (now - begin - TICK)))
        if now >= end:
            return lags


async def of_event(seconds: float) -> list[float]:
    """Answer a kernel timer every ``TICK``, for ``seconds``; the lags in milliseconds.

    Ticks that the loop has missed are read together; each counts from when it was due.
    """
    clock = time.monotonic  # the timer's
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    lags: list[float] = []
    start = clock() + TICK
    descriptor = _timer(start, TICK)

    def read() -> None:
        (ticks,) = struct.unpack("=Q", os.read(descriptor, 8))
        now = clock()
        for _ in range(ticks):
            lags.append(1e3 * (now - start - len(lags) * TICK))
        if now >= start + seconds and not over.done():
            over.set_result(None)

    loop.add_reader(descriptor, read)
    try:
        await over
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return lags


def _timer(start: float, period: float) -> int:
    """A descriptor that is readable from ``start`` (of ``time.monotonic``), every ``period``."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.timerfd_create needs Python 3.13
    descriptor = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    spec = struct.pack(
        "=4q", *(int(part) for at in (period, start) for part in (at // 1, at % 1 * 1e9))
    )
    absolute = 1
    if descriptor < 0 or libc.timerfd_settime(descriptor, absolute, spec, None):
        number = ctypes.get_errno()
        if descriptor >= 0:
            os.close(descriptor)
        raise OSError(number, os.strerror(number))
    return int(descriptor)


async def _beside(
    contender: Contender,
    fn: object,
    argument: float,
    lags: Coroutine[None, None, list[float]],
) -> list[float]:
    """What ``lags`` gives while 64 tasks await one call after the other."""
    done = False

    async def caller() -> None:
        while not done:
            await contender.run(fn, argument)

    callers = [asyncio.create_task(caller()) for _ in range(IN_FLIGHT)]
    try:
        return await lags
    finally:
        done = True
        await asyncio.gather(*callers)


GROUPS = (Lag(),)
