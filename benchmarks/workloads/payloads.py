"""Large arguments and results: bytes there and back, a NumPy array out, and back."""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

from .. import floors, jobs
from ..contenders import Contender
from ..measuring import Effort, Metric, NotMeasuredError, timed_calls
from .group import PEERS, Group

BYTES = 10 << 20
ARRAY = 80_000_000
KEPT = 8


def warm_copy(effort: Effort) -> dict[str, float]:
    """Copying the array within one process, and adding it up."""
    try:
        return {"array_out": floors.memcpy_and_sum(ARRAY, effort)}
    except ModuleNotFoundError as error:
        raise NotMeasuredError(f"{error.name} is not installed") from error


class Payloads(Group):
    """What a large argument or result costs."""

    name = "payloads"
    title = "Large arguments and results"
    work = (
        "10 MB of `bytes` sent and returned; an 80 MB NumPy array sent and added up; an 80 MB "
        "array that the worker has, returned and dropped at once, and 8 of them returned and all "
        "kept. 2 workers, one call at a time, after two to warm up. Each contender is given plain "
        "arguments, except Dask: its documentation asks to scatter large ones, which is what is "
        "done, and faster. Before each turn up to 2 GB are written to and given back: the host of "
        "a virtual machine provides memory when it is first touched, which would meet whoever "
        "comes first."
    )
    metrics = (
        Metric("bytes_echo", "10 MB bytes there and back", "ms"),
        Metric("array_out", "80 MB array out, summed", "ms"),
        Metric("array_back", "80 MB array back, dropped", "ms"),
        Metric("array_kept", "80 MB array back, kept", "ms"),
    )
    contenders = ("lease", "run", *PEERS)
    quick = ("run", "stdlib")
    quick_loops = ("asyncio",)
    floors = {"warm memcpy and the sum": warm_copy}
    timeout = 120.0
    memory = 2 << 30

    async def measure(self, contender: Contender, effort: Effort) -> dict[str, float]:
        try:
            import numpy as np
        except ModuleNotFoundError as error:
            raise NotMeasuredError(f"{error.name} is not installed") from error
        run = contender.run
        data = os.urandom(BYTES)
        array = np.random.default_rng(1).random(ARRAY // 8)
        if await run(jobs.echo, data) != data:
            raise RuntimeError("the bytes did not come back as they were sent")
        # Close, not equal: how an array is aligned decides in which order it is added up.
        if not math.isclose(await run(jobs.array_sum, array), jobs.array_sum(array)):
            raise RuntimeError("the array did not arrive as it was sent")
        figures = {
            "bytes_echo": await _typical(lambda: run(jobs.echo, data), effort),
            "array_out": await _typical(lambda: run(jobs.array_sum, array), effort),
            "array_back": await _typical(lambda: run(jobs.stored_array, ARRAY), effort),
        }
        kept: list[Any] = []

        async def keep() -> None:
            kept.append(await run(jobs.stored_array, ARRAY))

        durations = await timed_calls(keep, seconds=20, at_most=effort.pick(KEPT, 4))
        if any(len(one) != ARRAY // 8 or one[-1] != 1 for one in kept):
            raise RuntimeError("an array did not come back as it was sent")
        return {**figures, "array_kept": 1e3 * median(durations)}


async def _typical(call: Callable[[], Awaitable[Any]], effort: Effort) -> float:
    """The median of several calls after two that are not counted, in milliseconds."""
    await timed_calls(call, seconds=0, at_least=2)
    durations = await timed_calls(
        call, seconds=effort.pick(1.5, 0.3), at_least=effort.pick(5, 3), at_most=100
    )
    return 1e3 * median(durations)


GROUPS = (Payloads(),)
