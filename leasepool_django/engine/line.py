"""The strict first-in-first-out line, and the account of which worker is where.

Pure bookkeeping: no thread, no lock, no clock, no I/O, so that it can be checked against a model.
Everything here is called under the dispatcher's lock, which guards the ``Counters`` too. A worker's
place is a ``Slot``; at any moment a slot is in exactly one of these: its pool's ``idle`` list, a
lease, a running call, or out of service (no ready worker).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextvars import Context
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import _thread

    from ..backends.base import Worker
    from .lease import LeaseState
    from .progress import Listener

__all__ = ["Call", "Counters", "Line", "Pool", "Queue", "Request", "Slot", "Waiter"]

W = TypeVar("W", bound="Waiter")

NEW = 0
WAITING = 1  # in the line, or in a lease's own line
GRANTED = 2  # given to another loop or thread that has not picked it up yet
RUNNING = 3  # a call on its worker; a request whose lease is in the caller's hands
DONE = 4
GONE = 5  # cancelled, timed out or withdrawn; whoever holds it must not act on it any more


class Counters:
    """Totals since the start; guarded by the dispatcher's lock."""

    calls_started = 0
    calls_finished = 0
    calls_abandoned = 0
    leases_granted = 0
    leases_expired = 0
    rejected = 0
    leases_ended = 0
    mean_call_seconds = 0.0
    mean_lease_seconds = 0.0  # how long leases are held


class Waiter:
    """Someone who wants workers: a one-shot call or a request for a lease.

    ``home`` is the event loop the caller awaits on, ``None`` for a blocking caller; ``future`` and
    ``wakeup`` are how each is woken. All fields but those two are guarded by the dispatcher's lock
    until the state is DONE or GONE.
    """

    state = NEW
    workers = 1
    owner: str | None = None
    error: BaseException | None = None
    future: asyncio.Future[None] | None = None
    wakeup: _thread.LockType | None = None
    since = 0.0  # when it came (monotonic), once it has to wait
    ahead: Worker | None = None  # that a call was sent to while it was still waiting
    reminded = False  # its loop was asked twice to pick up what it was granted

    def __init__(self, home: asyncio.AbstractEventLoop | None) -> None:
        self.home = home

    def wake(self) -> None:
        """Let the caller go on. On the home loop's thread, or for a blocking caller on any."""
        if self.home is None:
            if self.wakeup is not None:
                try:
                    self.wakeup.release()
                except RuntimeError:
                    pass  # told before, and has not looked yet
        elif self.future is not None and not self.future.done():
            self.future.set_result(None)

    def wake_from_anywhere(self) -> None:
        """``wake``, on any thread."""
        if self.home is None:
            self.wake()
            return
        try:
            self.home.call_soon_threadsafe(self.wake)
        except RuntimeError:
            return  # its loop is closed: nobody is left to tell


class Call(Waiter):
    """One function call: encoded on its way out, then its outcome (``value`` or ``error``)."""

    value: Any = None
    slot: Slot | None = None
    # The worker it was given with the slot: the slot may have another one by now, this one dead.
    worker: Worker | None = None
    lease: LeaseState | None = None
    context: Context | None = None
    listener: Listener | None = None
    begun = 0.0
    deliveries = 0
    # Seconds it may wait, also if its worker turns out to have died before it could take it; and
    # how long it had such workers, which is no waiting.
    patience: float | None = None
    spent = 0.0

    def __init__(
        self,
        home: asyncio.AbstractEventLoop | None,
        function: Any,
        payload: Any,
        timeout: float | None,
    ) -> None:
        self.home = home
        self.function = function
        self.payload = payload
        self.timeout = timeout

    @property
    def function_name(self) -> str:
        """What to call the function in messages and snapshots; never shows argument values."""
        function = getattr(self.function, "func", self.function)  # functools.partial
        module = getattr(function, "__module__", None) or type(function).__module__
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        return f"{module}.{name}"


class Request(Waiter):
    """A request for a lease of ``workers`` workers of one pool."""

    lease: LeaseState | None = None

    def __init__(
        self,
        home: asyncio.AbstractEventLoop | None,
        workers: int,
        owner: str | None,
        lease_seconds: float,
        grace_seconds: float,
    ) -> None:
        super().__init__(home)
        self.workers = workers
        self.owner = owner
        self.lease_seconds = lease_seconds
        self.grace_seconds = grace_seconds


class Slot:
    """A worker's place in its pool, and who uses it."""

    __slots__ = ("call", "failures", "lease", "pool", "ready_at", "worker")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.worker: Worker | None = None
        self.lease: LeaseState | None = None
        self.call: Call | None = None
        self.failures = 0  # times in a row that its worker failed to start, or died unused
        self.ready_at = 0.0


class Pool:
    """``size`` slots that are started, sized and counted together."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.slots = [Slot(self) for _ in range(size)]
        self.idle: list[Slot] = []
        self.closing = False
        self.warm = False  # whether one of its workers has ever been ready

    @property
    def in_use(self) -> bool:
        """Whether any worker of this pool is leased or runs a call."""
        return any(slot.lease is not None or slot.call is not None for slot in self.slots)


class Queue(Generic[W]):
    """Who waits, first in first out: for the pools' workers, or for those of one lease.

    ``ahead``: the calls that wait in a worker's tray, and not in ``waiting``, in the order in which
    they were sent there. ``moved``: who was taken out of it last, until the account says what for.
    """

    def __init__(self) -> None:
        self.waiting: OrderedDict[W, None] = OrderedDict()
        self.ahead: dict[Call, None] = {}
        self.moved: W | None = None

    def __len__(self) -> int:
        return len(self.waiting) + len(self.ahead)

    def join(self, waiter: W) -> None:
        """Stand at the end."""
        self.waiting[waiter] = None
        waiter.state = WAITING

    def rejoin(self, waiter: W) -> None:
        """Stand where it stood before: only for a call that no worker has begun.

        Nobody who waits came before it but others that came back like this, so the way is short.
        """
        before = list(takewhile(lambda other: other.since < waiter.since, self.waiting))
        self.join(waiter)
        for each in (waiter, *reversed(before)):
            self.waiting.move_to_end(each, last=False)

    def leave(self, waiter: W) -> None:
        """Leave, from wherever in it."""
        self.waiting.pop(waiter, None)
        if self.moved is waiter:
            self.moved = None

    def pop(self) -> W:
        """Remove the first that stands in it, and return it."""
        waiting = self.waiting
        self.moved = head = next(iter(waiting))
        del waiting[head]
        return head

    @property
    def head(self) -> Waiter | None:
        """The first of all who wait."""
        waiters: Iterable[Waiter] = self.ahead or self.waiting
        return next(iter(waiters), None)


class Line(Queue[Waiter]):
    """Who waits for workers of the pools, and which slots are idle.

    ``requests``: how many of them want a lease, and ``requested`` how many workers together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pools: list[Pool] = []
        self.requests = 0
        self.requested = 0

    def queue_of(self, call: Call) -> Queue[Any]:
        """Where ``call`` stands when it has to wait."""
        return self if call.lease is None else call.lease

    def count(self, request: Request, sign: int) -> None:
        """``request`` has come (``1``) or gone (``-1``)."""
        self.requests += sign
        self.requested += sign * request.workers

    def recount(self) -> None:
        """Count anew, where it may have been interrupted."""
        requests = [one for one in self.waiting if isinstance(one, Request)]
        self.requests = len(requests)
        self.requested = sum(request.workers for request in requests)

    @property
    def workers(self) -> int:
        """How many workers there are, those that start included."""
        return sum([len(pool.slots) for pool in self.pools])

    def take(self, workers: int) -> list[Slot] | None:
        """Remove ``workers`` idle slots of one pool, the fullest pool that has them."""
        best: Pool | None = None
        for pool in self.pools:
            free = len(pool.idle)
            if free >= workers and (best is None or free < len(best.idle)):
                best = pool
        if best is None:
            return None
        taken = best.idle[-workers:]
        del best.idle[-workers:]
        return taken

    def take_one(self) -> Slot | None:
        """``take(1)`` without the list."""
        best: list[Slot] | None = None
        for pool in self.pools:
            idle = pool.idle
            if idle and (best is None or len(idle) < len(best)):
                best = idle
        return best.pop() if best is not None else None

    def grants(self) -> Iterator[tuple[Waiter, list[Slot]]]:
        """Give the head of the line what it asks for, as long as that fits."""
        while self.waiting:
            head = next(iter(self.waiting))
            slots = self.take(head.workers)
            if slots is None:
                return
            self.pop()
            if isinstance(head, Request):
                self.count(head, -1)
            yield head, slots
            self.moved = None
