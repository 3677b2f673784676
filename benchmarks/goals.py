"""What must be reached: a ratio, within one round, to a floor, a peer or the best peer.

``reference``: ``"floor:NAME"``, ``"best"`` (the best peer), the name of a contender, or ``None``
where the figure is a ratio already, or is bounded as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GOALS", "Goal"]


@dataclass(frozen=True)
class Goal:
    """``figure of contender ÷ figure of reference`` has to be at most, or at least, ``limit``."""

    group: str
    metric: str
    contender: str
    reference: str | None
    limit: float
    at_least: bool = False
    loop: str | None = None  # None: each loop that the group is measured on
    among: tuple[str, float] | None = None  # peers that reach this share of our figure, at least

    @property
    def key(self) -> str:
        """A name for JSON."""
        reference = f"/{self.reference}" if self.reference else ""
        return f"{self.group}.{self.metric}.{self.contender}{reference}"

    def reached(self, value: float) -> bool:
        """Whether ``value`` is good enough."""
        return value >= self.limit if self.at_least else value <= self.limit


PIPE = "floor:blocking pipe"

GOALS = (
    *(
        goal
        for contender in ("lease", "run")
        for goal in (
            Goal("latency", "p50", contender, PIPE, 1.4, loop="asyncio"),
            Goal("latency", "p50", contender, PIPE, 1.2, loop="uvloop"),
            Goal("latency", "p50", contender, "best", 1.0),
            Goal("throughput", "calls", contender, "best", 2.2, at_least=True),
            Goal("throughput", "calls", contender, "stdlib", 3.0, at_least=True),
            Goal("fairness", "of_ideal", contender, None, 1.04),
            Goal("fairness", "slowest", contender, None, 1.1),
        )
    ),
    Goal("latency", "p50", "lease", "leasepool-lease", 0.15),
    Goal("latency", "p50", "run", "leasepool", 0.15),
    Goal("latency", "p50", "django", PIPE, 1.8),
    *(Goal("batch", "efficiency", one, None, 0.97, at_least=True) for one in ("lease", "run")),
    Goal("payloads", "bytes_echo", "run", "best", 0.10),
    Goal("payloads", "array_out", "run", "floor:warm memcpy and the sum", 1.2),
    Goal("payloads", "array_out", "run", "stdlib", 1 / 15),
    Goal("payloads", "array_back", "run", "best", 0.10),
    Goal("payloads", "array_kept", "run", "best", 1 / 2.5),
    *(
        goal
        for calls in ("tiny", "busy")
        for goal in (
            Goal("lag", f"{calls}_allowed", "run", None, 1.0),
            Goal("lag", calls, "run", "best", 1.0),
            *(Goal("lag", f"{calls}_event", one, "best", 1.0) for one in ("run", "django")),
        )
    ),
    Goal("start", "first_answer", "django", "best", 1.15),
    Goal("workers", "next_worker", "django", None, 8.0),
    Goal("workers", "private", "django", None, 5.0),
    Goal("ballast", "next_worker", "django", None, 15.0),
    Goal("ballast", "private", "django", None, 5.0),
    *(Goal("cancel", "next_answer", one, None, 12.0) for one in ("run", "django")),
    Goal("waiting", "growth", "run", None, 1.25),
    Goal("waiting", "lease_growth", "run", None, 1.25),
    Goal("http", "requests", "django", "best", 0.98, at_least=True),
    Goal("http", "requests", "django", "leasepool", 1.3, at_least=True),
    Goal("http", "light_p99", "django", "best", 0.5, among=("requests", 0.95)),
    Goal("footprint", "import", "django", None, 15.0),
    Goal("footprint", "memory", "django", None, 3.0),
)
