"""Frozen snapshots of a manager: all that status pages, metrics and tests get to see.

Times are seconds; ages count from the moment of the snapshot. No argument values appear here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..backends.base import Backend
    from .config import ManagerConfig
    from .dispatcher import Dispatcher
    from .lease import LeaseState
    from .line import Call, Slot

__all__ = ["LeaseStats", "ManagerStats", "PoolStats", "WorkerStats", "snapshot"]


@dataclass(frozen=True)
class WorkerStats:
    """One place for a worker. ``state``: starting, idle, leased, busy, stopping or failed.

    ``seconds``: how long it has been running its call; ``None`` without one.
    """

    state: str
    pid: int | None
    calls: int
    function: str | None
    owner: str | None
    seconds: float | None


@dataclass(frozen=True)
class PoolStats:
    """One pool and its workers."""

    number: int
    workers: tuple[WorkerStats, ...]


@dataclass(frozen=True)
class LeaseStats:
    """One lease in force. ``expires_in`` is ``None`` for a lease that never expires."""

    lease_id: str
    owner: str | None
    workers: int
    running: int
    waiting: int
    age: float
    expires_in: float | None


@dataclass(frozen=True)
class ManagerStats:
    """A whole manager at one moment.

    ``live_workers``: worker processes that exist (starting and stopping ones included) for
    backends that have their own; ``calls_*``: totals since the start; ``mean_call_seconds``:
    a moving average of how long calls take; ``last_start_error``: why a worker last failed to
    start, until one starts again.
    """

    name: str
    backend: str
    state: str
    pools: tuple[PoolStats, ...]
    leases: tuple[LeaseStats, ...]
    max_pools: int
    workers_per_pool: int
    live_workers: int
    idle_workers: int
    busy_workers: int
    waiting: int
    longest_wait: float
    calls_started: int
    calls_finished: int
    calls_abandoned: int
    leases_granted: int
    leases_expired: int
    rejected: int
    workers_started: int
    workers_crashed: int
    workers_killed: int
    start_failures: int
    mean_call_seconds: float
    last_start_error: str | None


def snapshot(
    config: ManagerConfig, backend: Backend, dispatcher: Dispatcher, **facts: Any
) -> ManagerStats:
    """Take the picture, under the dispatcher's lock; ``facts`` are what the supervisor knows."""
    now = monotonic()
    with dispatcher.lock:
        line, counters = dispatcher.line, dispatcher.counters
        head = line.head
        pools = [(pool.number, [_seen(slot, now) for slot in pool.slots]) for pool in line.pools]
        facts |= {
            "leases": tuple(_lease(lease, now) for lease in dispatcher.leases),
            "live_workers": backend.live_workers(),
            "idle_workers": sum(len(pool.idle) for pool in line.pools),
            "busy_workers": sum(s.call is not None for pool in line.pools for s in pool.slots),
            "waiting": len(line),
            "longest_wait": now - head.since if head is not None else 0.0,
            "calls_started": counters.calls_started,
            "calls_finished": counters.calls_finished,
            "calls_abandoned": counters.calls_abandoned,
            "leases_granted": counters.leases_granted,
            "leases_expired": counters.leases_expired,
            "rejected": counters.rejected,
            "mean_call_seconds": counters.mean_call_seconds,
        }
    return ManagerStats(
        name=config.name_prefix,
        backend=backend.name,
        # Without the lock: a callable object may run code of its own when it is asked for a name.
        pools=tuple(
            PoolStats(
                number,
                tuple(
                    WorkerStats(function=call.function_name if call else None, **seen)
                    for seen, call in slots
                ),
            )
            for number, slots in pools
        ),
        max_pools=config.max_pools,
        workers_per_pool=config.workers_per_pool,
        **facts,
    )


def _seen(slot: Slot, now: float) -> tuple[dict[str, Any], Call | None]:
    worker, call, lease = slot.worker, slot.call, slot.lease
    if worker is None:
        state = "failed" if slot.failures else "starting"
    elif worker.leaving:
        state = "stopping"
    elif call is not None:
        state = "busy"
    else:
        state = "leased" if lease is not None else "idle"
    return {
        "state": state,
        "pid": worker.pid if worker is not None else None,
        "calls": worker.calls if worker is not None else 0,
        "owner": lease.owner if lease is not None else call.owner if call is not None else None,
        "seconds": None if call is None else max(0.0, now - call.begun) if call.begun else 0.0,
    }, call


def _lease(lease: LeaseState, now: float) -> LeaseStats:
    return LeaseStats(
        lease_id=lease.lease_id,
        owner=lease.owner,
        workers=lease.workers,
        running=sum(slot.call is not None for slot in lease.slots),
        waiting=len(lease.waiting) + len(lease.ahead),
        age=now - lease.begun,
        expires_in=None if lease.hard_expires_at == math.inf else lease.hard_expires_at - now,
    )
