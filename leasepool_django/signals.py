"""Django signals for what happens in the pools.

Each is sent with ``sender`` (the manager's class), ``alias`` and ``event``, a frozen
``leasepool_django.engine.Event`` whose ``facts`` hold the particulars: lease id, owner, pid, error.
Receivers run one after the other on a thread of the manager's own, never on an event loop; one
that raises is logged and disturbs nobody. They may use databases: connections that are too old or
broken are closed before and after, as around a request. ``lease_acquired`` and ``lease_released``
are only made while somebody listens, or the manager's logger is at DEBUG.
"""

from __future__ import annotations

from django.dispatch import Signal

from .engine import Event

__all__ = [
    "lease_acquired",
    "lease_expired",
    "lease_expiring",
    "lease_released",
    "pool_added",
    "pool_closed",
    "send",
    "wanted",
    "worker_crashed",
    "worker_killed",
    "worker_retired",
    "worker_start_failed",
    "worker_started",
]

lease_acquired = Signal()
lease_released = Signal()
lease_expiring = Signal()  # past its soft expiry
lease_expired = Signal()  # revoked
worker_started = Signal()
worker_start_failed = Signal()
worker_crashed = Signal()  # it died by itself
worker_killed = Signal()  # a call was cancelled or timed out, or its lease expired
worker_retired = Signal()  # recycled, or its pool was closed
pool_added = Signal()
pool_closed = Signal()

_BY_KIND = {
    "lease_acquired": lease_acquired,
    "lease_released": lease_released,
    "lease_expiring": lease_expiring,
    "lease_expired": lease_expired,
    "worker_started": worker_started,
    "worker_start_failed": worker_start_failed,
    "worker_crashed": worker_crashed,
    "worker_killed": worker_killed,
    "worker_retired": worker_retired,
    "pool_added": pool_added,
    "pool_closed": pool_closed,
}


def wanted(kind: str) -> bool:
    """Whether anybody listens to events of this kind."""
    signal = _BY_KIND.get(kind)
    return signal is not None and bool(signal.receivers)


def send(sender: type, alias: str, event: Event) -> None:
    """Pass an event of a manager on to the receivers; those that raise are logged by Django."""
    signal = _BY_KIND.get(event.kind)
    if signal is None:
        return
    from django.db import close_old_connections  # not before Django is set up

    close_old_connections()
    try:
        signal.send_robust(sender, alias=alias, event=event)
    finally:
        close_old_connections()
