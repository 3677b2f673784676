"""What became of each call: asked for once, run at most once, and answered as promised."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import Counter
from enum import IntEnum
from pathlib import Path

from leasepool_django.exceptions import (
    CallTimeoutError,
    LeaseExpiredError,
    LeaseTimeoutError,
    LeaseUnavailableError,
    NotPicklableError,
    RemoteError,
    WorkerCrashedError,
)
from tests.chaos.jobs import EXIT_STATUS, ChaosError

__all__ = ["ANSWERS", "Kind", "Ledger", "Outcome", "judge"]


class Kind(IntEnum):
    """What a call is like."""

    QUICK = 1
    SLOW = 2
    BUSY = 3
    FAILING = 4
    FAILING_BADLY = 5
    LARGE = 6
    LOGGING = 7
    UNPICKLABLE = 8
    LEAVING = 9
    CHILD = 10
    TIMED_OUT = 11
    CANCELLED = 12
    IMPATIENT = 13


class Outcome(IntEnum):
    """How a call ended. ``ABANDONED``: its event loop was closed under it."""

    OPEN = 0
    VALUE = 1
    OWN_ERROR = 2
    REMOTE_ERROR = 3
    NOT_PICKLABLE = 4
    CRASHED = 5
    CALL_TIMEOUT = 6
    CANCELLED = 7
    LEASE_TIMEOUT = 8
    UNAVAILABLE = 9
    EXPIRED = 10
    ABANDONED = 11
    WRONG = 12


# What a call of each kind may come to if nobody does harm. With harm a crash may happen to any, and
# on a lease that is held too long any may find it expired.
ANSWERS: dict[Kind, frozenset[Outcome]] = {
    Kind.QUICK: frozenset({Outcome.VALUE}),
    Kind.SLOW: frozenset({Outcome.VALUE}),
    Kind.BUSY: frozenset({Outcome.VALUE}),
    Kind.FAILING: frozenset({Outcome.OWN_ERROR}),
    Kind.FAILING_BADLY: frozenset({Outcome.REMOTE_ERROR}),
    Kind.LARGE: frozenset({Outcome.VALUE}),
    Kind.LOGGING: frozenset({Outcome.VALUE}),
    Kind.UNPICKLABLE: frozenset({Outcome.NOT_PICKLABLE}),
    Kind.LEAVING: frozenset({Outcome.CRASHED}),
    Kind.CHILD: frozenset({Outcome.VALUE}),
    Kind.TIMED_OUT: frozenset({Outcome.CALL_TIMEOUT}),
    Kind.CANCELLED: frozenset({Outcome.CANCELLED}),
    Kind.IMPATIENT: frozenset({Outcome.VALUE, Outcome.LEASE_TIMEOUT}),
}
# The function has run to its end, once; and it has certainly not begun.
RUN_ONCE = {Outcome.VALUE, Outcome.OWN_ERROR, Outcome.REMOTE_ERROR, Outcome.NOT_PICKLABLE}
NEVER_RUN = {Outcome.LEASE_TIMEOUT, Outcome.UNAVAILABLE}

CRASH_TEXTS = re.compile(
    r"The worker \(pid \d+\) running tests\.chaos\.jobs\.\w+ (?:"
    r"was killed by SIGKILL; often that is the kernel's out-of-memory killer|"
    r"died; the fork server that made it died, and it died with it|"
    rf"exited with status {EXIT_STATUS}; something called os\._exit\(\) or ended the process"
    r")\. It has been replaced; the call was not repeated\."
)
SHOWN = 20  # offences kept as text


def judge(error: BaseException, number: int) -> Outcome:
    """Which of the promised errors this is, down to its text; ``WRONG`` if it is none of them."""
    text = str(error)
    match error:
        case asyncio.CancelledError():
            return Outcome.CANCELLED
        case ChaosError() if error.number == number:
            return Outcome.OWN_ERROR
        case RemoteError() if error.text == str(number) and error.type_name in {
            "SystemExit",
            "KeyboardInterrupt",
            "StopIteration",
        }:
            return Outcome.REMOTE_ERROR
        case NotPicklableError() if "result[0]" in text and "_thread.lock" in text:
            return Outcome.NOT_PICKLABLE
        case CallTimeoutError() if "ran longer than its call_timeout of" in text:
            return Outcome.CALL_TIMEOUT
        case WorkerCrashedError() if CRASH_TEXTS.fullmatch(text):
            return Outcome.CRASHED
        case LeaseTimeoutError() if "came within" in text:
            return Outcome.LEASE_TIMEOUT
        case LeaseUnavailableError() if "can be had now" in text:
            return Outcome.UNAVAILABLE
        case LeaseExpiredError() if "expired after" in text and "was revoked" in text:
            return Outcome.EXPIRED
    return Outcome.WRONG


class Ledger:
    """All calls of a run: a few bytes each, so that it does not hide a growth of the engine's.

    ``harmed``: whether any worker may be killed at any moment.
    """

    def __init__(self, *, harmed: bool) -> None:
        self._harmed = harmed
        self.crashed_pids: Counter[int] = Counter()
        self.crashes_by_server = 0
        self.wrong: list[str] = []
        self.outcomes: Counter[tuple[Kind, Outcome]] = Counter()
        self._lock = threading.Lock()
        self._kinds = bytearray()
        self._outcomes = bytearray()
        self._open: dict[int, float] = {}

    @property
    def calls(self) -> int:
        """How many calls were asked for."""
        return len(self._kinds)

    def begin(self, kind: Kind) -> int:
        """A call is about to be asked for; returns its number."""
        with self._lock:
            number = len(self._kinds)
            self._kinds.append(kind)
            self._outcomes.append(Outcome.OPEN)
            self._open[number] = time.monotonic()
            return number

    def value(self, number: int, *, right: bool) -> None:
        """The call has returned something."""
        outcome = Outcome.VALUE if right else Outcome.WRONG
        self._end(number, outcome, "returned " + ("a value" if right else "another value"))

    def error(self, number: int, error: BaseException, *, expiring: bool = False) -> None:
        """The call has raised. ``expiring``: its lease was held longer than it may be."""
        if isinstance(error, WorkerCrashedError):
            with self._lock:
                if "fork server" in str(error):
                    self.crashes_by_server += 1
                elif error.pid is not None and error.exitcode is None:
                    self.crashed_pids[error.pid] += 1
        what = f"raised {type(error).__name__}: {error}"
        self._end(number, judge(error, number), what, expiring=expiring)

    def abandon(self, number: int) -> None:
        """The caller is gone together with its event loop."""
        self._end(number, Outcome.ABANDONED, "was abandoned")

    def _end(self, number: int, outcome: Outcome, what: str, *, expiring: bool = False) -> None:
        with self._lock:
            if self._outcomes[number] == Outcome.ABANDONED:
                return
            kind = Kind(self._kinds[number])
            promised = ANSWERS[kind] | {Outcome.ABANDONED}
            if self._harmed:
                promised |= {Outcome.CRASHED}
            if self._outcomes[number] != Outcome.OPEN:
                self._offend(f"call {number} ({kind.name}) ended twice, the second time it {what}")
            elif outcome not in promised and not (expiring and outcome is Outcome.EXPIRED):
                self._offend(f"call {number} ({kind.name}) {what}")
            self._outcomes[number] = outcome
            self.outcomes[kind, outcome] += 1
            self._open.pop(number, None)

    def offend(self, what: str) -> None:
        """Note something else that must not happen."""
        with self._lock:
            self._offend(what)

    def _offend(self, what: str) -> None:
        if len(self.wrong) < SHOWN:
            self.wrong.append(what[:2000])
        elif len(self.wrong) == SHOWN:
            self.wrong.append("... and more")

    def still_open(self, older_than: float = 0.0) -> list[str]:
        """The calls without an answer that were asked for more than so many seconds ago."""
        now = time.monotonic()
        with self._lock:
            return [
                f"call {number} ({Kind(self._kinds[number]).name}) for {now - since:.1f} s"
                for number, since in self._open.items()
                if now - since >= older_than
            ]

    def check_marks(self, path: Path) -> int:
        """Compare the outcomes with what was really run; returns how many calls were."""
        counts = bytearray(len(self._kinds))
        with path.open("rb") as marks:
            for line in marks:
                number = int(line)
                counts[number] = min(255, counts[number] + 1)
        for number, count in enumerate(counts):
            outcome = Outcome(self._outcomes[number])
            kind = Kind(self._kinds[number]).name
            if count > 1:
                self.offend(f"call {number} ({kind}) was run {count} times; then: {outcome.name}")
            elif count == 0 and outcome in RUN_ONCE:
                self.offend(f"call {number} ({kind}) was answered without being run")
            elif count == 1 and outcome in NEVER_RUN:
                self.offend(f"call {number} ({kind}) was run, and its caller told {outcome.name}")
        return sum(map(bool, counts))
