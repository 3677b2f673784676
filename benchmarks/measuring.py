"""What a measurement is made of: metrics, how much to do, and reasons for not measuring."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from statistics import median, quantiles
from typing import Any, TypeVar

__all__ = [
    "LOOPS",
    "Better",
    "Effort",
    "Metric",
    "NotMeasuredError",
    "new_loop",
    "percentile",
    "run_async",
    "timed_calls",
]

T = TypeVar("T")

LOOPS = ("asyncio", "uvloop")
NO_LOOP = "-"  # the loop of a cell that needs none


class Better(StrEnum):
    """Which of two values of a metric is the better one."""

    LOWER = "lower"
    HIGHER = "higher"


@dataclass(frozen=True)
class Metric:
    """One figure that a group gives for each contender. ``name`` is its key in the JSON."""

    name: str
    title: str
    unit: str
    better: Better = Better.LOWER


@dataclass(frozen=True)
class Effort:
    """How much a cell does. ``quick``: enough to notice a change, in a fraction of the time."""

    quick: bool = False

    def pick(self, full: T, quick: T) -> T:
        """``full``, or ``quick`` in a quick run."""
        return quick if self.quick else full


class NotMeasuredError(Exception):
    """A cell that gives no figures; its text is the reason, which the report shows."""


def new_loop(name: str) -> asyncio.AbstractEventLoop:
    """A new event loop of the kind ``name``; ``NotMeasuredError`` where it is not installed."""
    if name == "uvloop":
        try:
            import uvloop
        except ImportError:
            raise NotMeasuredError("uvloop is not installed") from None
        return uvloop.new_event_loop()
    return asyncio.SelectorEventLoop()


def run_async(main: Callable[[], Awaitable[T]], loop: str) -> T:
    """Run ``main()`` to its end on a new loop of the kind ``loop``."""

    async def awaited() -> T:
        return await main()

    with asyncio.Runner(loop_factory=lambda: new_loop(loop)) as runner:
        return runner.run(awaited())


async def timed_calls(
    call: Callable[[], Awaitable[Any]], *, seconds: float, at_least: int = 1, at_most: int = 100_000
) -> list[float]:
    """Make calls one after the other and return the seconds each took.

    Ends after ``seconds`` or ``at_most`` calls, but not before ``at_least`` calls.
    """
    durations: list[float] = []
    clock = time.perf_counter
    end = clock() + seconds
    while len(durations) < at_most:
        begin = clock()
        result = await call()
        now = clock()
        # After the time was taken: letting go of a large result is no part of the call.
        del result
        durations.append(now - begin)
        if now >= end and len(durations) >= at_least:
            break
    return durations


def percentile(values: list[float], percent: int) -> float:
    """The value that ``percent`` of all values do not exceed."""
    if len(values) < 2:
        return values[0]
    return median(values) if percent == 50 else quantiles(values, n=100)[percent - 1]
