"""What the ``thread`` backend does for Django: its ``hooks``.

Its threads share this process's settings, caches and mail with their callers. But an asgiref
``Local``, in which Django keeps the active language and time zone, is empty on another thread,
though the context is a copy; and database connections belong to a thread, and no request ends there
that would look after them. Imported by the engine for that backend.
"""

from __future__ import annotations

from django.db import reset_queries

from .django_inline import capture, prepare
from .process.django_worker import Captured, tidy_connections
from .process.django_worker import enter as activate

__all__ = ["capture", "enter", "leave", "prepare"]


def enter(captured: Captured) -> None:
    """Activate the caller's language and time zone, and forget queries logged before."""
    activate(captured)
    reset_queries()


def leave() -> None:
    """Leave none of this thread's connections broken, too old or inside a transaction."""
    tidy_connections()
