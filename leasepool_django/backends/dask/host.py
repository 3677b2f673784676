"""What the ``dask`` backend does on the machines of the cluster, inside Dask's worker processes.

Dask brings the messages here; calls run in worker processes of our own, those of the ``process``
backend, next to Dask's. So a call can be stopped, and a crash costs one call.

The manager of a server, known by its ``token`` ("…@address of this worker of Dask's"), holds
numbered *seats*: each is the right to have one call at a time here. There are as many as Dask's
worker has threads. Messages may be lost, or overtake each other, so the server says every few
seconds which seats it still has (``beat``): others are freed, with what runs on them, and all if
nothing is heard any more. Everything here but ``perform`` runs on the event loop of Dask's worker,
and what stands between two ``await`` is done without interruption.
"""

from __future__ import annotations

import asyncio
import math
import os
import pickle
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from time import monotonic
from typing import Any, NamedTuple

from ...engine import ExecutorLease, LeasedExecutorManager
from ...exceptions import (
    LeaseExpiredError,
    LeasePoolError,
    LeasePoolNotStartedError,
    LeaseTimeoutError,
    WorkerStartError,
)
from ..process import wire
from ..process.carriers import Carriers
from ..process.errors import leading_frames, note
from ..process.pickling import explain_result, shown_name
from ..process.remote import encode_exception, resolve
from ..process.shared import dump, load_parts

__all__ = [
    "CANCELLED",
    "FAILED",
    "FULL",
    "GONE",
    "SILENT_SECONDS",
    "Spec",
    "beat",
    "call",
    "cancel",
    "give_back",
    "leave",
    "perform",
    "take_seat",
]

SILENT_SECONDS = 15.0  # after which a server that says nothing is taken for gone
LOOK_SECONDS = 0.2  # between two looks at why there is no worker
LINGER_SECONDS = 5.0  # for which workers are kept that have no seat, as another is taken soon
SETTINGS = "DJANGO_SETTINGS_MODULE"
# What the functions below answer, besides an outcome.
FULL = "full"
GONE = "gone"  # there is no such seat
CANCELLED = "cancelled"
FAILED = "failed"

Answer = tuple[Any, ...]


class Spec(NamedTuple):
    """What the workers of one manager are like. ``options``: of the ``process`` backend."""

    name: str
    settings: str | None
    options: Mapping[str, Any]


class _Seat:
    """``lease``: of one worker, which is ready; ``task``: what waits for it, then calls."""

    lease: ExecutorLease | None = None
    number: int | None = None  # of the call that runs
    task: asyncio.Task[Any] | None = None

    async def stop(self) -> None:
        """Stop the call that runs here, if there is one; returns when it has stopped."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])

    async def free(self) -> None:
        """Do so, and let others have the worker."""
        await self.stop()
        if self.lease is not None:
            await self.lease.release()


class _Guest:
    """What one manager has in one of Dask's worker processes."""

    def __init__(self, spec: Spec, threads: int) -> None:
        self.seats: dict[int, _Seat] = {}
        self.refused: deque[int] = deque(maxlen=1000)  # calls that must not begin any more
        self.heard = self.used = monotonic()
        self.manager = LeasedExecutorManager(
            backend="process",
            max_pools=threads,
            workers_per_pool=1,
            units_per_pool=1,
            size_provider=lambda: len(self.seats),
            name_prefix=spec.name,
            shutdown_grace_seconds=0,
            **spec.options,
        )
        self.tasks: set[asyncio.Task[Any]] = set()

    def keep(self, work: Any) -> None:
        """Have ``work`` done; the loop refers to it but weakly."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def free(self, seat: int) -> None:
        """Free a seat, once what runs there has stopped."""
        found = self.seats.get(seat)
        if found is not None:
            await found.free()
            self.seats.pop(seat, None)
            self.used = monotonic()
            self.manager.notify_scale_changed()


_guests: dict[str, _Guest] = {}
_left: deque[str] = deque(maxlen=1000)  # tokens
_STOPPED = "The manager was stopped meanwhile."


async def take_seat(token: str, seat: int, spec: Spec, dask_worker: Any) -> Answer:
    """Take a seat for the manager ``token``: ``()``, or ``FULL``, or ``FAILED`` and the error.

    Returns when its worker is ready.
    """
    if token in _left:
        return FAILED, WorkerStartError(_STOPPED)
    threads = dask_worker.state.nthreads
    here = "@" + token.partition("@")[2]
    if sum(len(guest.seats) for who, guest in _guests.items() if who.endswith(here)) >= threads:
        return (FULL,)
    guest = _guests.get(token)
    try:
        if guest is None:
            _agree_on_settings(spec)
            guest = _guests[token] = _Guest(spec, threads)
            guest.keep(_watch(token, guest))
        taken = guest.seats[seat] = _Seat()
        taken.task = asyncio.create_task(_lease(guest))
        taken.lease = await taken.task
        taken.task = None
    except asyncio.CancelledError:
        if guest is not None:
            await guest.free(seat)
        handler = asyncio.current_task()
        if handler is not None and handler.cancelling():  # Dask's worker ends
            raise
        return FAILED, WorkerStartError(_STOPPED)
    except Exception as error:  # noqa: BLE001 - the server reports it
        if guest is not None:
            guest.seats.pop(seat, None)
            guest.used = monotonic()
        return FAILED, _of_ours(error)
    if _guests.get(token) is not guest:
        await guest.manager.stop(grace=0)  # who dismissed it could not see it running
    if _guests.get(token) is not guest or seat not in guest.seats:
        return FAILED, WorkerStartError(_STOPPED)
    return ()


async def _lease(guest: _Guest) -> ExecutorLease:
    """Lease a worker that is ready; ``WorkerStartError`` if none can be started."""
    manager = guest.manager
    await manager.start()
    manager.notify_scale_changed()
    while True:
        try:
            return await manager.acquire(workers=1, lease_seconds=math.inf, timeout=LOOK_SECONDS)
        except LeaseTimeoutError:
            trouble = manager.stats().last_start_error
            if trouble is not None:
                raise WorkerStartError(trouble) from None


async def give_back(token: str, seat: int) -> Answer:
    """Give a seat back; what runs there is stopped before."""
    guest = _guests.get(token)
    if guest is not None:
        await guest.free(seat)
    return ()


async def leave(token: str) -> Answer:
    """Give all seats back at once, and stop what still runs on them or is being started.

    For good: a wish for a seat that was sent before and comes later is refused.
    """
    _left.append(token)
    guest = _guests.get(token)
    if guest is not None:
        await _dismiss(token, guest)
    return ()


async def beat(token: str, seats: Collection[int], up_to: int) -> Answer:
    """Hear that the manager is there and has these ``seats``; which of them there are.

    Others of its seats are freed, but for those with numbers above ``up_to``, which it had not
    thought of yet when it said so.
    """
    guest = _guests.get(token)
    if guest is None:
        return ()
    guest.heard = monotonic()
    for seat in list(guest.seats):
        if seat <= up_to and seat not in seats:
            guest.keep(guest.free(seat))
    return tuple(seat for seat in seats if seat in guest.seats)


async def call(token: str, seat: int, number: int, frame: tuple[Any, ...]) -> Answer:
    """Run one call; ``CANCELLED``, ``GONE``, or ``FAILED`` and why, or what ``perform`` returns.

    That together with whether the seat's worker takes no further call.
    """
    guest = _guests.get(token)
    taken = guest.seats.get(seat) if guest is not None else None
    if guest is None or taken is None:
        return (GONE,)
    await taken.stop()  # what the server has lost sight of
    if number in guest.refused:
        return (CANCELLED,)
    if taken.lease is None:
        return (GONE,)
    task = asyncio.create_task(taken.lease.run(perform, *frame))
    taken.number, taken.task = number, task
    outcome: Answer
    try:
        outcome = (*await task, not taken.lease.ready)
    except asyncio.CancelledError:
        handler = asyncio.current_task()
        if handler is not None and handler.cancelling():  # Dask's worker ends
            task.cancel()
            raise
        outcome = (CANCELLED,)
    except (LeasePoolNotStartedError, LeaseExpiredError):
        outcome = (GONE,)  # it was dismissed
    except Exception as error:  # noqa: BLE001 - the caller gets it
        outcome = (FAILED, _of_ours(error))
    finally:
        if taken.task is task:
            taken.number = taken.task = None
    return outcome


async def cancel(token: str, seat: int, number: int) -> Answer:
    """Stop a call, with all that it has started, and also if it is still to come."""
    guest = _guests.get(token)
    if guest is not None:
        guest.refused.append(number)
        taken = guest.seats.get(seat)
        if taken is not None and taken.number == number:
            await taken.stop()
    return ()


async def _dismiss(token: str, guest: _Guest) -> None:
    if _guests.get(token) is guest:
        del _guests[token]
    await guest.manager.stop(grace=0)


async def _watch(token: str, guest: _Guest) -> None:
    """End the calls of a server that is gone, and workers that nobody has a seat for."""
    while _guests.get(token) is guest:
        now = monotonic()
        if guest.heard + SILENT_SECONDS <= now:
            break
        if not guest.seats and guest.used + LINGER_SECONDS <= now:
            break
        await asyncio.sleep(LINGER_SECONDS / 5)
    await _dismiss(token, guest)  # not for good: it may only have been stopped for a while


def _agree_on_settings(spec: Spec) -> None:
    """The workers are started by this process, and have its environment."""
    if spec.settings is None:
        return
    here = os.environ.setdefault(SETTINGS, spec.settings)
    if here != spec.settings:
        raise WorkerStartError(
            f"This worker of Dask has {SETTINGS}={here!r}, and the server {spec.settings!r}. One "
            "cluster can serve one project."
        )


def _of_ours(error: Exception) -> Exception:
    """``error``, if the other side knows its class and it can travel, or what stands for it."""
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        if isinstance(error, LeasePoolError):
            return error
    return LeasePoolError(f"{type(error).__name__}: {error}")


# -- in the worker ---------------------------------------------------------------------------------


@cache
def _carriers(context: tuple[str, ...]) -> Carriers:
    return Carriers(context)


@cache
def _hooks(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def perform(kind: int, body: bytes, hooks: str | None, context: Sequence[str]) -> tuple[int, bytes]:
    """Run the call that is in ``body``, in a worker; its outcome is for ``outcomes.decode``.

    ``kind`` tells whether ``body`` has parts. The context and the look after connections are the
    worker's own, as for any call.
    """
    load = load_parts if kind == wire.RESULT_PARTS else pickle.loads
    try:
        try:
            reference, args, kwargs, captured = load(body)
        except BaseException as error:
            note(error, "Raised in the worker, when it unpickled the call's arguments.")
            raise
        function = resolve(reference) if isinstance(reference, str) else reference
        if context:
            captured, values = captured
            _carriers(tuple(context)).apply(values)
        if hooks is not None and captured is not None:
            _hooks(hooks).enter(captured)
        result = function(*args, **kwargs)
        del args, kwargs
        try:
            payload = dump(result, pieces=True)
        except Exception as error:  # noqa: BLE001 - explained
            # It has the culprit's own error as its cause.
            raise explain_result(error, result, shown_name(function))  # noqa: B904
        return wire.RESULT_PARTS, b"".join(payload.frame(wire.RESULT_PARTS))[wire.HEADER_SIZE :]
    except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is
        frame_locals = _hooks(hooks).frame_locals if hooks is not None else None
        ours = leading_frames(error, {__name__})
        return wire.ERROR, encode_exception(error, frame_locals, ours)
