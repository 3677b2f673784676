"""From cancelling a call to the next answer of the capacity it held."""

from __future__ import annotations

import asyncio
import time
from statistics import median

from .. import floors, jobs
from ..contenders import Contender, Entry, Wanted
from ..fifo import Fifo
from ..measuring import Effort, Metric
from .group import PEERS, Group

LONGEST = 20.0  # seconds that a call runs if nobody ends it


def kill_and_fork(effort: Effort) -> dict[str, float]:
    """Killing a bare child, waiting for its end, forking another and having its answer."""
    return {"next_answer": floors.fresh_fork(effort)}


class Cancel(Group):
    """One worker, busy with a call that is cancelled while another waits."""

    name = "cancel"
    title = "Cancel, until the capacity has answered another call"
    work = (
        "One worker runs a CPU loop; the task that awaits it is cancelled, and a tiny call made "
        "at once. Milliseconds until that has its answer. `run_in_pool` with Django set up."
    )
    metrics = (Metric("next_answer", "cancel → next answer", "ms"),)
    contenders = ("run", "django", *PEERS)
    quick = ("run", "django")
    quick_loops = ("asyncio",)
    floors = {"kill and fork": kill_and_fork}

    def wanted(self) -> Wanted:
        return Wanted(workers=1)

    def refusal(self, entry: Entry) -> str | None:
        return None if entry.kind.stops_calls else "cannot stop a function that runs"

    async def measure(self, contender: Contender, effort: Effort) -> dict[str, float]:
        with Fifo() as begun:
            await contender.run(jobs.tiny, 1)
            durations = [await _cancel_one(contender, begun) for _ in range(effort.pick(20, 8))]
        return {"next_answer": 1e3 * median(durations)}


async def _cancel_one(contender: Contender, begun: Fifo) -> float:
    async def call() -> None:
        await contender.run(jobs.announce_and_spin, begun.path, LONGEST)

    task = asyncio.create_task(call())
    await begun.received()
    begin = time.perf_counter()
    task.cancel()
    await contender.run(jobs.tiny, 1)
    taken = time.perf_counter() - begin
    await asyncio.gather(task, return_exceptions=True)
    return taken


GROUPS = (Cancel(),)
