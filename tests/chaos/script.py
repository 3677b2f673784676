"""What one caller asks for, by its seed, and how it judges the answers."""

from __future__ import annotations

import logging
import random
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from leasepool_django import LeasedExecutorManager
from leasepool_django.exceptions import LeaseUnavailableError
from tests.chaos import jobs
from tests.chaos.ledger import Kind, Ledger, Outcome, judge

__all__ = [
    "LEASE_EVERY",
    "MIX",
    "Call",
    "LeasePlan",
    "Mix",
    "Records",
    "Script",
    "World",
    "caller_number",
]

# What is asked for how often, of a thousand.
Mix = Mapping[Kind, int]
MIX: Mix = {
    Kind.QUICK: 640,
    Kind.SLOW: 60,
    Kind.BUSY: 15,
    Kind.FAILING: 60,
    Kind.FAILING_BADLY: 25,
    Kind.LARGE: 60,
    Kind.LOGGING: 40,
    Kind.UNPICKLABLE: 25,
    Kind.LEAVING: 5,
    Kind.CHILD: 5,
    Kind.TIMED_OUT: 15,
    Kind.CANCELLED: 20,
    Kind.IMPATIENT: 30,
}
LEASE_EVERY = 12  # one of so many turns is a lease with several calls
FOR_EVER = 60.0  # seconds that a call takes which is to be stopped
KEPT_RESULTS = 3  # large results that a caller keeps, and looks at again later
LARGEST = 1 << 21

caller_number: ContextVar[int] = ContextVar("caller_number", default=-1)


class Call(NamedTuple):
    """One call: what to ask for, how, and how to tell the right answer."""

    kind: Kind
    number: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    timeout: float | None
    call_timeout: float | None
    cancel_after: float | None
    right: Callable[[Any], bool]


class Records(logging.Handler):
    """Counts the workers' log records, and holds that each comes in its caller's context, in order.

    A record of a call whose caller is gone may still come; nobody looks at it.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.seen = 0
        self._ledger = ledger
        self._next: dict[int, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        number, index = record.__dict__["call_number"], record.__dict__["record_index"]
        self.seen += 1
        if caller_number.get() != number:
            self._ledger.offend(
                f"a record of call {number} came in the context of {caller_number.get()}"
            )
        expected = self._next.get(number)
        if expected is not None:
            if expected != index:
                self._ledger.offend(f"record {index} of call {number} came when {expected} was due")
            self._next[number] = index + 1

    def expect(self, number: int) -> None:
        """The call is about to be made."""
        self._next[number] = 0

    def take(self, number: int) -> int:
        """How many records of the call have come; none is expected any more."""
        return self._next.pop(number, 0)


@dataclass
class World:
    """What all callers share."""

    manager: LeasedExecutorManager
    ledger: Ledger
    records: Records
    seed: str
    mix: Mix
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    leases: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count_lease(self, what: str) -> None:
        with self.lock:
            self.leases[what] += 1


class Script:
    """What one caller does, by its seed. ``name`` tells callers apart."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.random = random.Random(f"{world.seed}/{name}")
        self._kept: list[tuple[int, memoryview]] = []

    def next_call(self, *, leased: bool = False, cancellable: bool = True) -> Call:
        """Choose a call, and enter it in the ledger."""
        mix = self.world.mix
        kinds = [
            kind
            for kind in mix
            if not (leased and kind is Kind.IMPATIENT)
            and (cancellable or kind is not Kind.CANCELLED)
        ]
        kind = self.random.choices(kinds, [mix[kind] for kind in kinds])[0]
        return self.make(kind)

    def make(self, kind: Kind) -> Call:
        """A call of one kind, entered in the ledger."""
        number = self.world.ledger.begin(kind)
        pick = self.random
        timeout = call_timeout = cancel_after = None
        arguments: tuple[Any, ...] = ()

        def wrong(_: Any) -> bool:
            return False

        right: Callable[[Any], bool] = wrong
        match kind:
            case Kind.QUICK | Kind.IMPATIENT:
                value = pick.getrandbits(40)
                function: Callable[..., Any] = jobs.quick
                arguments = (value,)
                right = (value + number).__eq__
                if kind is Kind.IMPATIENT:
                    timeout = pick.uniform(0.0005, 0.02)
            case Kind.SLOW:
                function, arguments = jobs.slow, (pick.uniform(0.001, 0.03),)
                right = number.__eq__
            case Kind.BUSY:
                function, arguments = jobs.spin, (pick.uniform(0.001, 0.02),)
                right = number.__eq__
            case Kind.FAILING:
                function = jobs.fail
            case Kind.FAILING_BADLY:
                function = jobs.fail_badly
            case Kind.LARGE:
                data, size = self._large_argument(), 8 * pick.randrange(1, LARGEST // 8)
                function, arguments = jobs.large, (data, size)
                checksum = zlib.crc32(data)

                def right(result: Any) -> bool:
                    return self._large_result(number, result, checksum, size)
            case Kind.LOGGING:
                count = pick.randrange(1, 30)
                function, arguments = jobs.log, (count,)
                self.world.records.expect(number)
                right = count.__eq__
            case Kind.UNPICKLABLE:
                function = jobs.unpicklable
            case Kind.LEAVING:
                function = jobs.leave
            case Kind.CHILD:
                function = jobs.leave_a_child
                right = (1).__le__
            case Kind.TIMED_OUT:
                function, arguments = jobs.slow, (FOR_EVER,)
                call_timeout = pick.uniform(0.005, 0.06)
            case Kind.CANCELLED:
                function, arguments = jobs.slow, (FOR_EVER,)
                cancel_after = pick.uniform(0.0, 0.05)
        return Call(kind, number, function, arguments, timeout, call_timeout, cancel_after, right)

    def _large_argument(self) -> bytes | memoryview:
        data = self.random.randbytes(8) * self.random.randrange(1, LARGEST // 8)
        return memoryview(data) if self.random.random() < 0.5 else data

    def _large_result(self, number: int, result: Any, checksum: int, size: int) -> bool:
        """Whether it is right; a view of shared memory is kept, and looked at again later."""
        seen, data = result
        if isinstance(data, memoryview):
            self._kept.append((number, data))
            if len(self._kept) > KEPT_RESULTS:
                self.look_at_kept(self._kept.pop(0))
        right: bool = seen == checksum and data == number.to_bytes(8, "little") * (size // 8)
        return right

    def look_at_kept(self, *kept: tuple[int, memoryview]) -> None:
        """Hold that results which were kept have not changed."""
        for number, data in kept or self._kept:
            if data != number.to_bytes(8, "little") * (len(data) // 8):
                self.world.ledger.offend(f"the kept result of call {number} has changed")
        if not kept:
            self._kept.clear()

    def ended(self, call: Call, answer: Any, *, expiring: bool = False) -> None:
        """Tell the ledger: ``answer`` is what was returned, or the exception."""
        ledger = self.world.ledger
        if isinstance(answer, BaseException):
            if call.kind is Kind.LOGGING:
                self.world.records.take(call.number)
            ledger.error(call.number, answer, expiring=expiring)
            return
        if call.kind is Kind.LOGGING:
            came = self.world.records.take(call.number)
            if came != call.arguments[0]:
                ledger.offend(f"{came} of {call.arguments[0]} records of call {call.number} came")
        ledger.value(call.number, right=call.right(answer))


class LeasePlan:
    """How a lease is asked for and used."""

    def __init__(self, script: Script) -> None:
        pick = script.random
        self._script = script
        self._largest = script.world.manager.workers_per_pool
        self.how = pick.choices(
            ["released", "extended", "expiring", "dropped", "at once", "impatient"],
            [60, 8, 8, 4, 10, 10],
        )[0]
        self.expiring = self.how == "expiring"
        self.extension = pick.uniform(30, 90)
        self.arguments: dict[str, Any] = {"owner": "chaos"}
        if pick.random() < 0.8:
            self.arguments["workers"] = pick.randint(1, self._largest)
        if self.expiring:
            self.arguments["lease_seconds"] = pick.uniform(0.005, 0.05)
        elif self.how == "at once":
            self.arguments["wait"] = False
        elif self.how == "impatient":
            self.arguments["timeout"] = pick.uniform(0.001, 0.05)

    def calls(self, *, cancellable: bool = True) -> Iterator[list[Call]]:
        """Lists of calls that are made one after the other; the lists at the same time."""
        pick = self._script.random
        for _ in range(pick.randint(1, self._largest + 1)):
            yield [
                self._script.make(Kind.SLOW)
                if self.expiring and pick.random() < 0.5
                else self._script.next_call(leased=True, cancellable=cancellable)
                for _ in range(pick.randint(1, 4))
            ]

    def refused(self, error: LeaseUnavailableError) -> None:
        """No lease came: hold that this was to be expected."""
        outcome = judge(error, -1)
        expected = {"at once": Outcome.UNAVAILABLE, "impatient": Outcome.LEASE_TIMEOUT}
        if expected.get(self.how) is not outcome:
            self._script.world.ledger.offend(f"a lease ({self.how}) was refused: {error!r}")
        self._script.world.count_lease(f"{self.how}, refused")
