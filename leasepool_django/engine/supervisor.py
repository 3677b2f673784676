"""The life of a manager: start, sizing, replacing workers, enforcing deadlines, stop.

All of it runs on the housekeeper's thread unless a docstring says otherwise, so its fields need no
lock; what other threads read too is in the dispatcher. It implements ``Host`` for the backend.

Long because start, replacement, resizing and stop are one state machine.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..exceptions import (
    CallTimeoutError,
    LeasePoolNotStartedError,
    WorkerCrashedError,
    WorkerStartError,
)
from .dispatcher import Dispatcher
from .events import Event, Notifier, Subscriber
from .housekeeper import Housekeeper
from .line import Call, Pool, Slot

if TYPE_CHECKING:
    from ..backends.base import Backend, Worker
    from .config import ManagerConfig
    from .lease import LeaseState
    from .stats import ManagerStats

__all__ = ["Supervisor"]

FIRST_RETRY = 0.1  # seconds before a worker that failed to start is started again; doubles
LAST_RETRY = 30.0
LEAVING_SECONDS = 2.0  # how long idle workers may take to end by themselves at a stop

NEW, STARTING, RUNNING = "new", "starting", "running"
DRAINING, ENDING, STOPPED = "draining", "ending", "stopped"
AT_REST = {NEW, STOPPED}


class Supervisor:
    """Runs one manager from its start to its stop, and again after the next start."""

    housekeeper: Housekeeper

    def __init__(
        self,
        config: ManagerConfig,
        backend: Backend,
        subscribers: list[Subscriber],
    ) -> None:
        self._config = config
        self._backend = backend
        self._subscribers = subscribers
        self._logger = config.logger or logging.getLogger("leasepool")
        self.dispatcher = Dispatcher(
            config.name_prefix,
            max_waiting=config.max_waiting,
            tell=self.tell,
            grow=lambda: self.post(self._grow),
            retire=self._retire_later,
            idle_while_closed=self._wake_housekeeper,
        )
        # At each call, most of them: not by way of methods here.
        self.call_ended = self.dispatcher.call_ended
        self.look_ahead = self.dispatcher.look_ahead
        self.worker_dead = self.dispatcher.worker_dead
        self._life = threading.Lock()  # guards start() against start() and stop()
        self._state = NEW
        self._started: Future[None] = _done()
        self._stopped: Future[None] = _done()
        self._notifier = Notifier(config.name_prefix, self._logger)
        self._pool_number = 0
        self._target = config.min_pools
        self._next_size_check = math.inf
        self._stop_by = math.inf
        self._leave_leases = False  # while it drains: an idle lease holds up the end
        self._had_grace = False  # while it drains: calls were given time to end
        self._totals = {"started": 0, "crashed": 0, "killed": 0, "failures": 0}
        self._last_start_error: BaseException | None = None

    # -- any thread --------------------------------------------------------------------------------

    def start(self) -> Future[None]:
        """Begin to start unless that is done or under way; resolved when it is done."""
        with self._life:
            if self._state in (STARTING, RUNNING) or not self._started.done():
                return self._started
            if self._state in (DRAINING, ENDING):
                failed: Future[None] = Future()
                failed.set_exception(
                    LeasePoolNotStartedError(
                        f"The manager {self._config.name_prefix!r} is stopping. Await stop() "
                        "before you start it again."
                    )
                )
                return failed
            notifier = Notifier(self._config.name_prefix, self._logger)
            housekeeper = Housekeeper(self._config.name_prefix, self._logger, self._tick)
            try:
                notifier.start(self._subscribers)
                housekeeper.start()
            except BaseException:
                notifier.stop(1.0)
                housekeeper.discard()
                raise
            self._notifier, self.housekeeper = notifier, housekeeper
            self._started, self._stopped = Future(), Future()
            self._state = STARTING
            self._stop_by = math.inf
            self.post(self._open)
            return self._started

    def stop(self, grace: float) -> Future[None]:
        """Begin to stop unless that is done or under way; resolved when nothing is left."""
        with self._life:
            if self._state in (NEW, STOPPED):
                return _done()
            stopped = self._stopped
            self.post(lambda: self._begin_stop(grace, leases=False))
        return stopped

    def request_stop(self, grace: float, after: float) -> None:
        """Begin to stop ``after`` seconds from now, without a lock and without a way to wait.

        Unlike ``stop``, which is called when nobody is left who could use them, this leaves
        leases to their holders for as long as ``grace`` allows.
        """
        if self._state in (NEW, STOPPED):
            return

        def begin() -> None:
            self._begin_stop(grace, leases=True, waited=after)

        def begin_later() -> None:
            self.housekeeper.call_later(after, begin)

        self.post(begin_later if after else begin)

    def _wake_housekeeper(self) -> None:
        self.housekeeper.wake()

    def post(self, job: Callable[[], None]) -> None:
        """Run ``job`` on the housekeeper's thread. Takes no lock."""
        self.housekeeper.post(job)

    def hand_over(self, job: Callable[[], None]) -> None:
        """See ``Host.hand_over``."""
        self._notifier.put(job)

    def tell(self, event: Event) -> None:
        """See ``Host.tell``."""
        if self._wanted(event.kind, event.level):
            self._notifier.tell(event)

    def _wanted(self, kind: str, level: int) -> bool:
        return self._logger.isEnabledFor(level) or any(
            subscriber.may_want(kind) for subscriber in self._subscribers
        )

    def call_undelivered(self, worker: Worker, call: Call, *, suspect: bool = True) -> bool:
        """See ``Host.call_undelivered``."""
        return self.dispatcher.call_undelivered(worker, call, suspect=suspect)

    def lease_begun(self, lease: LeaseState) -> None:
        """Tell of a new lease, and watch its deadlines."""
        self.housekeeper.wake_by(lease.soft_expires_at)
        self._tell_lease("lease_acquired", lease, "acquired")

    def lease_ended(self, lease: LeaseState) -> None:
        """Tell that a lease was given back."""
        self._tell_lease("lease_released", lease, "released")

    def return_dropped(self, lease: LeaseState) -> None:
        """Housekeeper: take back a lease that nobody has any more, and warn."""
        if not self.dispatcher.release(lease):
            return
        self.lease_ended(lease)
        text = (
            f"lease {lease.lease_id} (owner {lease.owner!r}) of {self._config.name_prefix!r} was "
            "dropped without release; it has been returned. Use `async with`, or await "
            "lease.release()."
        )
        self.hand_over(lambda: warnings.warn(text, ResourceWarning, stacklevel=1))

    def _tell_lease(self, kind: str, lease: LeaseState, verb: str) -> None:
        if self._wanted(kind, logging.DEBUG):
            text = f"lease {lease.lease_id} (owner {lease.owner!r}, {lease.workers} workers) {verb}"
            name = self._config.name_prefix
            self._notifier.tell(Event(kind, name, text, logging.DEBUG, lease.facts()))

    def start_trouble(self) -> str | None:
        """Why workers do not start at present, in one line."""
        error = self._last_start_error
        return str(error).splitlines()[0] if error is not None else None

    def desired_pools(self) -> int:
        """The sizing rule; calls ``size_provider``, so never on the housekeeper's thread."""
        config = self._config
        wanted = 0
        if config.size_provider is not None:
            try:
                units = int(config.size_provider())
                wanted = -(-units // config.units_per_pool)  # rounded up, however large
            except Exception:
                self._logger.exception("%s: size_provider raised", config.name_prefix)
        return min(max(config.min_pools, wanted), config.max_pools)

    def check_size(self) -> None:
        """Ask the sizing rule on the notifier's thread, then resize."""
        if self._state != RUNNING:
            return
        self._notifier.put(lambda: self._sized(self.desired_pools()))

    def _sized(self, target: int) -> None:
        self.post(lambda: self._resize(target))

    # -- start -------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._backend.open(self)
            # While workers get ready, and not when somebody looks: descriptors may be short then.
            from . import stats  # noqa: F401

            self._target = self._config.min_pools
            for _ in range(self._config.min_pools):
                if self._state == STARTING:  # the pool before may have failed at once
                    self._add_pool()
        except Exception as error:  # noqa: BLE001 - start() raises it
            if self._state == STARTING:
                self._fail_start(error)

    def _add_pool(self) -> None:
        self._pool_number += 1
        pool = Pool(self._pool_number, self._config.workers_per_pool)
        self.dispatcher.add_pool(pool)
        self._tell("pool_added", f"pool {pool.number} added", pool=pool.number)
        for slot in list(pool.slots):
            if self._state in (STARTING, RUNNING):
                self._backend.start_worker(slot)

    def _grow(self) -> None:
        if self._state == RUNNING and self.dispatcher.may_grow():
            self._add_pool()

    def worker_ready(self, slot: Slot, worker: Worker) -> None:
        """See ``Host.worker_ready``."""
        self._totals["started"] += 1
        self._last_start_error = None
        self._tell("worker_started", f"worker {worker.pid} is ready", pid=worker.pid)
        self.dispatcher.slot_ready(slot, worker)
        if self._state == STARTING and all(pool.warm for pool in self.dispatcher.line.pools):
            with self.dispatcher.lock:
                self.dispatcher.max_pools = self._config.max_pools
                self.dispatcher.closed = None
                self._state = RUNNING  # whoever reads that it runs is not refused
            if self._config.size_provider is not None:
                self._next_size_check = monotonic()
            elif self._config.min_pools < self._config.max_pools:
                self._next_size_check = monotonic() + self._config.check_interval
            self._started.set_result(None)

    def start_failed(self, slot: Slot, error: BaseException) -> None:
        """See ``Host.start_failed``."""
        self._totals["failures"] += 1
        self._last_start_error = error
        if self._state == STARTING:
            self._fail_start(error)
            return
        if self._state != RUNNING:
            self._slot_ended(slot)
            return
        with self.dispatcher.lock:
            slot.failures += 1
            delay = _delay(slot.failures)
        self._tell(
            "worker_start_failed",
            f"a worker could not be started; next try in {delay:g} s: {error}",
            logging.ERROR,
            error=str(error),
            retry_in=delay,
        )
        self.housekeeper.call_later(delay, lambda: self._restart(slot))

    def _restart(self, slot: Slot) -> None:
        if self._slot_ended(slot) and (
            self._state in (STARTING, RUNNING)
            # The lease may be used until the end.
            or (self._state == DRAINING and slot.lease is not None)
        ):
            self._backend.start_worker(slot)

    def _fail_start(self, error: BaseException, why: str = "could not be started") -> None:
        with self.dispatcher.lock:
            self.dispatcher.closed = why
        if not isinstance(error, Exception):
            error = WorkerStartError(f"A worker could not be started: {error!r}")
        self._finish(error)

    # -- replacing ---------------------------------------------------------------------------------

    def worker_gone(self, slot: Slot, *, crashed: bool) -> None:
        """See ``Host.worker_gone``."""
        worker = slot.worker
        if worker is not None:
            kind = "crashed" if crashed else "killed" if worker.killed else None
            if kind is not None:
                self._totals[kind] += 1
            how, facts = worker.ending() if crashed else ("", {})
            self._tell(
                f"worker_{kind or 'retired'}",
                f"worker {worker.pid} {kind or 'has left'} after {worker.calls} call(s){how}",
                logging.WARNING if crashed else logging.DEBUG,
                pid=worker.pid,
                calls=worker.calls,
                **facts,
            )
            with self.dispatcher.lock:
                useless = crashed and worker.calls == 0 and slot.call is None
                if not useless or monotonic() - slot.ready_at > LAST_RETRY:
                    slot.failures = 0
                slot.failures += useless
                delay = _delay(slot.failures)
            if useless:
                # It died soon, before it did anything: wait a little more each time.
                if self._slot_ended(slot):
                    self.housekeeper.call_later(delay, lambda: self._restart(slot))
                return
        self._restart(slot)

    def _slot_ended(self, slot: Slot) -> bool:
        pool = slot.pool
        wanted = self.dispatcher.slot_gone(slot)
        if pool.closing and not pool.slots:
            self._tell("pool_closed", f"pool {pool.number} closed", pool=pool.number)
            if self._state == RUNNING:
                self._fill()  # it stood in the way of a larger target
        return wanted

    def _retire_later(self, slot: Slot) -> None:
        """Under the dispatcher's lock: end the idle worker of a closing pool."""
        worker = slot.worker
        assert worker is not None
        worker.leaving = True
        self.post(worker.retire)

    def _resize(self, target: int) -> None:
        if self._state != RUNNING:
            return
        self._target = target
        self._fill()
        self.dispatcher.close_pools_above(target)

    def _fill(self) -> None:
        while self.dispatcher.lacks_pool(self._target):
            self._add_pool()

    # -- deadlines ---------------------------------------------------------------------------------

    def _tick(self, now: float) -> float:
        due = self.dispatcher.look(now)
        for lease in due.soft:
            self.dispatcher.expire_softly(lease)
        for lease in due.hard:
            workers = self.dispatcher.revoke(lease)
            if workers is None:
                continue
            for worker in workers:
                worker.kill(lease.refusal)
            self._tell(
                "lease_expired",
                f"lease {lease.lease_id} (owner {lease.owner!r}) was revoked: it was held longer "
                f"than {lease.hard_expires_at - lease.begun:g} s",
                logging.WARNING,
                **lease.facts(),
            )
        for lease in due.dropped:
            self.return_dropped(lease)
        for worker, call in due.overdue:
            worker.kill(partial(self._timed_out, call))
        for worker, call in due.lost:
            worker.kill(partial(_lost, call))
        next_look = due.next_look
        if self._state == RUNNING and self._next_size_check <= now:
            self._next_size_check = now + self._config.check_interval
            self.check_size()
        elif self._state == DRAINING:
            if now >= self._stop_by or not self.dispatcher.working(leases=self._leave_leases):
                self._end_workers(now)
            next_look = min(next_look, self._stop_by)
        elif self._state == ENDING:
            if now >= self._stop_by or not self._backend.live_workers():
                self._finish(None)
            next_look = min(next_look, self._stop_by)
        return min(next_look, self._next_size_check)

    # -- stop --------------------------------------------------------------------------------------

    def _begin_stop(self, grace: float, *, leases: bool, waited: float = 0.0) -> None:
        now = monotonic()
        if self._state == STARTING:
            self._fail_start(
                LeasePoolNotStartedError(
                    f"The manager {self._config.name_prefix!r} was stopped while it started."
                ),
                "has been stopped",
            )
        elif self._state == RUNNING:
            self._stop_by = now + grace
            self._had_grace = grace + waited > 0
            self._leave_leases = leases
            self.dispatcher.close("is stopping", self._drain)
            self.housekeeper.wake()
        elif self._state == DRAINING:
            if now + grace < self._stop_by:
                self._stop_by = now + grace
                self._had_grace = grace > 0
            self._leave_leases = self._leave_leases and leases
            self.housekeeper.wake()

    def _drain(self) -> None:
        self._state = DRAINING

    def _end_workers(self, now: float) -> None:
        """Kill what still runs, let idle workers leave."""
        self._state = ENDING
        self._stop_by = now + LEAVING_SECONDS
        name = self._config.name_prefix
        fate = (
            "its worker was killed"
            if self._backend.supports_kill
            else f"the backend {self._backend.name!r} cannot stop it"
        )

        # Where there was none, the process was told to end at once, which is not for settings.
        advice = " A longer shutdown grace gives calls more time." if self._had_grace else ""

        def stopped() -> LeasePoolNotStartedError:
            return LeasePoolNotStartedError(
                f"The manager {name!r} was stopped before this call had ended; {fate}.{advice}"
            )

        for worker in self.dispatcher.end():
            worker.kill(stopped)
        self.housekeeper.wake()

    def _finish(self, error: BaseException | None) -> None:
        """End what is left, then this thread; ``error``: why the start failed."""
        try:
            self._backend.close()
        finally:
            with self.dispatcher.lock:
                self.dispatcher.line.pools.clear()
                self.dispatcher.leases.clear()
                if error is None:
                    self.dispatcher.closed = "has been stopped"
            self._next_size_check = math.inf
            self._notifier.stop(5.0)
            self._state = ENDING
            self.housekeeper.stop(partial(self._over, error))

    def _over(self, error: BaseException | None) -> None:
        """The last act of a life: from here on another may begin, on another thread."""
        started, stopped = self._started, self._stopped
        self._state = STOPPED
        if error is not None:
            started.set_exception(error)
        stopped.set_result(None)

    def discard(self) -> None:
        """After a fork, in the child: close copied descriptors, touch nothing shared."""
        if self._state not in (NEW, STOPPED):
            self.dispatcher.discard()
            self._backend.discard()
            self.housekeeper.discard()

    # -- looking (any thread) ----------------------------------------------------------------------

    def pool_counts(self) -> tuple[int, int]:
        """How many pools there are, and how many of them are in use."""
        with self.dispatcher.lock:
            pools = self.dispatcher.line.pools
            return len(pools), sum(pool.in_use for pool in pools)

    @property
    def state(self) -> str:
        """As ``stats()`` says it, without a lock."""
        return "stopping" if self._state in (DRAINING, ENDING) else self._state

    def stats(self) -> ManagerStats:
        """See ``LeasedExecutorManager.stats``."""
        from .stats import snapshot

        error = self._last_start_error
        return snapshot(
            self._config,
            self._backend,
            self.dispatcher,
            state=self.state,
            last_start_error=str(error) if error is not None else None,
            workers_started=self._totals["started"],
            workers_crashed=self._totals["crashed"],
            workers_killed=self._totals["killed"],
            start_failures=self._totals["failures"],
        )

    def _tell(self, kind: str, text: str, level: int = logging.DEBUG, **facts: Any) -> None:
        self.tell(Event(kind, self._config.name_prefix, text, level, facts))

    def _timed_out(self, call: Call) -> CallTimeoutError:
        name = call.function_name
        fate = (
            " and was stopped"
            if self._backend.supports_kill
            else f"; the backend {self._backend.name!r} cannot stop it"
        )
        return CallTimeoutError(
            f"{name} ran longer than its call_timeout of {call.timeout:g} s{fate}.",
            timeout=call.timeout,
            function=name,
        )


def _lost(call: Call) -> WorkerCrashedError:
    name = call.function_name
    return WorkerCrashedError(
        f"The worker of {name} was killed: the event loop of its caller was closed, or a signal "
        "handler raised while the outcome was on its way.",
        function=name,
    )


def _delay(failures: int) -> float:
    """Seconds until the next try, after so many failures in a row."""
    return min(LAST_RETRY, FIRST_RETRY * 2.0 ** min(max(failures, 1) - 1, 16))


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
