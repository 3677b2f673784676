"""The interface of a group of workloads, and the way most of them measure a contender."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from ..contenders import CONTENDERS, Contender, Entry, Wanted, make
from ..measuring import LOOPS, Effort, Metric, run_async

__all__ = ["CONCURRENT", "PEERS", "SEQUENTIAL", "Floor", "Group"]

Figures = dict[str, float]
Floor = Callable[[Effort], Figures]

PEERS = ("stdlib", "loky", "pebble", "anyio", "aiomultiprocess", "deadpool", "dask", "leasepool")
# For calls one after the other a lease that is held is a measurement of its own; for many at once
# the number of leasepool's pools is.
SEQUENTIAL = ("lease", "run", "django", "django-nice-0", *PEERS, "leasepool-lease")
CONCURRENT = ("lease", "run", "django", *PEERS, "leasepool-one")


class Group(ABC):
    """Workloads that are measured together. A cell of it is one contender on one loop."""

    name: ClassVar[str]
    title: ClassVar[str]
    work: ClassVar[str]
    """What is done, in a sentence for the report."""
    metrics: ClassVar[tuple[Metric, ...]]
    contenders: ClassVar[tuple[str, ...]]
    peers: ClassVar[tuple[str, ...]] = PEERS
    """Among whom the best peer is looked for."""
    quick: ClassVar[tuple[str, ...]] = ()
    """The contenders of a quick run."""
    quick_loops: ClassVar[tuple[str, ...] | None] = None
    loops: ClassVar[tuple[str, ...]] = LOOPS
    floors: ClassVar[Mapping[str, Floor]] = {}
    floor_titles: ClassVar[Mapping[str, str]] = {}
    """Names to show for floors, where their keys say too little."""
    pinned: ClassVar[bool] = False
    """Whether everything runs on one core."""
    processes: ClassVar[int] = 1
    """In how many, one after the other, a cell is measured; the median of their figures counts."""
    timeout: ClassVar[float] = 60.0
    """Seconds after which a cell is ended."""
    memory: ClassVar[int] = 0
    """Bytes of memory that the machine is to have ready when a cell begins."""

    def wanted(self) -> Wanted:
        """What a contender must bring."""
        return Wanted()

    def refusal(self, entry: Entry) -> str | None:
        """Why a contender cannot do this work; ``None`` if it can."""
        return None

    def cell(self, contender: str, loop: str, effort: Effort) -> Figures:
        """Measure one contender, in this process. Raises ``NotMeasuredError`` with the reason."""

        async def main() -> Figures:
            adapter = make(contender, self.wanted())
            await adapter.start()
            try:
                return await self.measure(adapter, effort)
            finally:
                await adapter.stop()

        return run_async(main, loop)

    @abstractmethod
    async def measure(self, contender: Contender, effort: Effort) -> Figures:
        """Give the figures of a contender that is started."""

    def all_contenders(self, effort: Effort) -> tuple[str, ...]:
        """Who takes part."""
        return effort.pick(self.contenders, self.quick)

    def all_loops(self, effort: Effort) -> tuple[str, ...]:
        """The event loops on which this is measured."""
        return effort.pick(self.loops, self.quick_loops or self.loops)

    def title_of(self, contender: str) -> str:
        """The name to show for a contender or a floor."""
        entry = CONTENDERS.get(contender)
        return entry.title if entry else self.floor_titles.get(contender, contender)
