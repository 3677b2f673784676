"""What the ``dask`` backend does on the machines of the cluster, inside Dask's worker processes.

Dask brings the messages here; calls run in worker processes of our own, those of the ``process``
backend, next to Dask's. So a call can be stopped, and a crash costs one call. The manager of a
server holds *seats*: the right to have one call at a time here. There are as many as Dask's worker
has threads. Who holds some says so every few seconds, for if that server is gone its calls must
not go on. Everything here but ``perform`` runs on the event loop of Dask's worker.
"""

from __future__ import annotations

import asyncio
import os
import pickle
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from time import monotonic
from typing import Any, NamedTuple

from ...engine import LeasedExecutorManager
from ...exceptions import LeasePoolError, WorkerStartError
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
SETTINGS = "DJANGO_SETTINGS_MODULE"
# What the functions below answer, besides an outcome.
FULL = "full"
CANCELLED = "cancelled"
FAILED = "failed"

Answer = tuple[Any, ...]


class Spec(NamedTuple):
    """What the workers of one manager are like. ``options``: of the ``process`` backend."""

    name: str
    settings: str | None
    options: Mapping[str, Any]


class _Guest:
    """The seats of one manager in one of Dask's worker processes."""

    def __init__(self, spec: Spec, workers: int) -> None:
        self.seats = 0
        self.calls: dict[int, asyncio.Task[Any]] = {}
        self.heard = monotonic()
        self.manager = LeasedExecutorManager(
            backend="process",
            max_pools=1,
            workers_per_pool=workers,
            name_prefix=spec.name,
            shutdown_grace_seconds=0,
            **spec.options,
        )
        self.watch: asyncio.Task[None] | None = None


_guests: dict[str, _Guest] = {}
_left: deque[str] = deque(maxlen=1000)  # tokens
_coming_and_going = asyncio.Lock()


async def take_seat(token: str, spec: Spec, dask_worker: Any) -> Answer:
    """Take one seat for the manager ``token``: ``()``, or ``FULL``, or ``FAILED`` and the error."""
    async with _coming_and_going:
        threads = dask_worker.state.nthreads
        if sum(guest.seats for guest in _guests.values()) >= threads:
            return (FULL,)
        if token in _left:
            return FAILED, WorkerStartError("The manager was stopped meanwhile.")
        guest = _guests.get(token)
        try:
            if guest is None:
                _agree_on_settings(spec)
                guest = _Guest(spec, threads)
                _guests[token] = guest
                guest.watch = asyncio.create_task(_watch(token, guest))
            guest.seats += 1
            await guest.manager.start()
            if _guests.get(token) is not guest:  # it has left, and could not see it running
                await guest.manager.stop(grace=0)
                return FAILED, WorkerStartError("The manager was stopped meanwhile.")
        except Exception as error:  # noqa: BLE001 - the server reports it
            if guest is not None:
                guest.seats -= 1
            await _close_empty(token)
            return FAILED, _of_ours(error)
        return ()


async def give_back(token: str) -> Answer:
    """Give one seat back; with the last one the workers of that manager end."""
    async with _coming_and_going:
        guest = _guests.get(token)
        if guest is not None:
            guest.seats -= 1
            await _close_empty(token)
    return ()


async def leave(token: str) -> Answer:
    """Give all seats back at once, and stop what still runs on them or is being started.

    For good: a wish for a seat that was sent before and comes later is refused.
    """
    _left.append(token)
    await _dismiss(token)
    return ()


async def beat(token: str) -> bool:
    """Hear that the manager is still there; whether it has a seat here."""
    guest = _guests.get(token)
    if guest is not None:
        guest.heard = monotonic()
    return guest is not None


async def call(token: str, number: int, frame: tuple[Any, ...]) -> Answer:
    """Run one call; what ``perform`` returns, ``CANCELLED``, or ``FAILED`` and the error."""
    guest = _guests.get(token)
    task = asyncio.current_task()
    if guest is None or task is None:
        return FAILED, LeasePoolError("This server was taken for gone, as it said nothing.")
    guest.calls[number] = task
    try:
        outcome: Answer = await guest.manager.run(perform, *frame)
    except asyncio.CancelledError:
        return (CANCELLED,)
    except Exception as error:  # noqa: BLE001 - the caller gets it
        return FAILED, _of_ours(error)
    finally:
        guest.calls.pop(number, None)
    return outcome


async def cancel(token: str, number: int) -> Answer:
    """Stop a call, with all that it has started; returns when ``call`` has."""
    guest = _guests.get(token)
    task = guest.calls.get(number) if guest is not None else None
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
    return ()


async def _close_empty(token: str) -> None:
    guest = _guests.get(token)
    if guest is not None and guest.seats <= 0:
        await _dismiss(token)


async def _dismiss(token: str) -> None:
    guest = _guests.pop(token, None)
    if guest is not None:
        if guest.watch is not None and guest.watch is not asyncio.current_task():
            guest.watch.cancel()
        await guest.manager.stop(grace=0)


async def _watch(token: str, guest: _Guest) -> None:
    """End the calls of a server that is gone."""
    while (left := guest.heard + SILENT_SECONDS - monotonic()) > 0:  # noqa: ASYNC110 - no event
        await asyncio.sleep(left)
    await _dismiss(token)  # not for good: it may only have been stopped for a while


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
