"""What the ``inline`` backend does for Django: its ``hooks``.

Calls share this process's settings, connections, caches and mail with their callers, so that there
is nothing to set up and nothing to close after a call. Imported by the engine for that backend.
"""

from __future__ import annotations

from collections.abc import Callable

from asgiref.sync import sync_to_async
from django.db import connections
from django.utils import timezone, translation

from .process.django_worker import REFUSED, Captured, enter, frame_locals, portable_zone

__all__ = [
    "REFUSED",
    "capture",
    "enter",
    "frame_locals",
    "in_thread",
    "leave",
    "leave_thread",
    "prepare",
]


def capture() -> Captured:
    """Return the caller's active language and time zone.

    Always: the defaults of a fresh context are this process's present settings, a test's overrides
    included, and need not be those that a worker has.
    """
    return translation.get_language(), portable_zone(timezone.get_current_timezone())


async def in_thread(job: Callable[[], None]) -> None:
    """Run ``job`` where asynchronous code runs the ORM: there its transaction is, if it has one."""
    await sync_to_async(job, thread_sensitive=True)()


def prepare(preload: Callable[[], None]) -> None:
    """Import the preload modules; Django is set up here."""
    preload()


def leave() -> None:
    """Do nothing: connections are the callers' own."""


def leave_thread() -> None:
    """Close the connections that the initializer has opened; its thread is no caller's."""
    connections.close_all()
