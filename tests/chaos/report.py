"""What a run came to: figures for people, and the list of broken promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean

from tests.chaos.ledger import Kind, Outcome
from tests.chaos.watch import Samples

__all__ = ["Quiet", "Report"]


@dataclass
class Quiet:
    """What there is between two rounds.

    ``segments``: descriptors of shared memory, up to four for each worker; ``private``: bytes of
    memory without what is shared; ``resident``: with it.
    """

    resident: int
    private: int
    descriptors: Counter[str]
    segments: int


@dataclass
class Report:
    """What a run came to."""

    seed: str
    seconds: float = 0.0
    calls: int = 0
    run: int = 0
    outcomes: Counter[tuple[Kind, Outcome]] = field(default_factory=Counter)
    leases: Counter[str] = field(default_factory=Counter)
    signals: Counter[tuple[str, str]] = field(default_factory=Counter)
    records: int = 0
    joined: int = 0
    granted: int = 0
    sent_ahead: int = 0
    longest_line: int = 0
    bound: int = 0
    samples: Samples = field(default_factory=Samples)
    quiet: list[Quiet] = field(default_factory=list)
    workers_started: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """How many SIGKILL were sent."""
        return sum(count for (name, _), count in self.signals.items() if name == "SIGKILL")

    def growth(self) -> float:
        """Bytes of memory that the second half has added: its last two rounds to its first two."""
        half = [quiet.private for quiet in self.quiet[len(self.quiet) // 2 :]]
        return mean(half[-2:]) - mean(half[:2])

    def lines(self) -> Iterator[str]:
        """The summary, for people."""
        yield f"seed {self.seed}: {self.calls} calls in {self.seconds:.1f} s, {self.run} were run"
        yield f"{'':14}" + "".join(f"{outcome.name.lower():>15}" for outcome in self._columns())
        for kind in Kind:
            row = [self.outcomes[kind, outcome] for outcome in self._columns()]
            yield f"{kind.name.lower():14}" + "".join(f"{number or '-':>15}" for number in row)
        total = Counter(outcome for (_, outcome), n in self.outcomes.items() for _ in range(n))
        yield f"{'all':14}" + "".join(f"{total[outcome]:>15}" for outcome in self._columns())
        yield "leases: " + ", ".join(f"{n} {how}" for how, n in sorted(self.leases.items()))
        yield f"{self.kills} kills; signals: " + ", ".join(
            f"{n} {name} to a {whom}" for (name, whom), n in sorted(self.signals.items())
        )
        yield (
            f"{self.workers_started} workers started; at most {self.samples.most} of {self.bound} "
            f"at once; {self.samples.taken} samples, stats() still in {self.samples.agreeing}, "
            f"equal to the system in {self.samples.equal}, longest difference "
            f"{self.samples.longest_difference:.2f} s"
        )
        yield (
            f"line: {self.joined} joined, {self.granted} were served in that order, "
            f"{self.sent_ahead} of them sent ahead, at most {self.longest_line} waited; "
            f"{self.records} log records"
        )
        for number, quiet in enumerate(self.quiet):
            yield (
                f"after round {number}: {quiet.resident / 1e6:.1f} MB resident, "
                f"{quiet.private / 1e6:.1f} MB private, "
                f"{quiet.descriptors.total()} descriptors and {quiet.segments} segments"
            )

    def _columns(self) -> list[Outcome]:
        return [
            outcome for outcome in Outcome if any(self.outcomes[kind, outcome] for kind in Kind)
        ]
