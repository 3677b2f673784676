"""Functions that show what a worker has of Django: models, connections, caches, languages.

Apart from ``django_jobs``, since importing models needs Django to be set up.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.core.cache import caches
from django.core.cache.backends.locmem import LocMemCache
from django.db import Error, connection, transaction
from django.utils import timezone, translation
from django.views.decorators.debug import sensitive_variables

T = TypeVar("T")


def language_and_zone() -> tuple[str | None, str, str]:
    """The active language, a translation, and the local hour of an instant in summer."""
    instant = dt.datetime(2026, 7, 1, 12, tzinfo=dt.UTC)
    local = timezone.localtime(instant)
    return translation.get_language(), translation.gettext("Yes"), local.strftime("%H:%M %Z")


def activate_something_else() -> None:
    translation.activate("fr")
    timezone.activate("Asia/Tokyo")


def count_users() -> int:
    return User.objects.count()


def create_user(name: str) -> int:
    return User.objects.create(username=name).pk


def keep_connections() -> None:
    """Let this worker keep its connection between calls."""
    connection.settings_dict["CONN_MAX_AGE"] = None


def use_connection() -> int:
    connection.ensure_connection()
    return id(connection.connection)


def connection_state() -> tuple[bool, bool, bool]:
    """Whether there is an open connection; in an atomic block; with logged queries."""
    return (
        connection.connection is not None,
        connection.in_atomic_block,
        bool(connection.queries_log),
    )


def leave_atomic_block_open(name: str) -> None:
    transaction.atomic().__enter__()
    User.objects.create(username=name)


def leave_autocommit_off(name: str) -> None:
    transaction.set_autocommit(False)
    User.objects.create(username=name)


def break_connection() -> None:
    """Get an error from a database that does not answer any more, which SQLite always does."""
    connection.is_usable = lambda: False  # type: ignore[method-assign]
    try:
        connection.cursor().execute("no such statement")
    except Error:
        return


def log_queries() -> int:
    connection.force_debug_cursor = True
    User.objects.count()
    return len(connection.queries_log)


def on_a_loop(function: Callable[[], T]) -> T:
    """Run ``function`` as asynchronous code does that calls the ORM."""

    async def work() -> T:
        return await sync_to_async(function)()

    return asyncio.run(work())


def use_orm_on_a_loop() -> int:
    on_a_loop(keep_connections)

    async def work() -> int:
        return await User.objects.acount()

    return asyncio.run(work())


def leave_atomic_block_open_on_a_loop(name: str) -> None:
    on_a_loop(lambda: leave_atomic_block_open(name))


def connection_state_on_a_loop() -> tuple[bool, bool, bool]:
    return on_a_loop(connection_state)


class ClosingCache(LocMemCache):
    """A cache with connections, which counts how often it is closed."""

    closed = 0

    def close(self, **kwargs: Any) -> None:
        type(self).closed += 1


def use_cache(alias: str, key: str) -> int:
    """Count up; the number of times the cache has been closed before."""
    caches[alias].set(key, 1)
    return ClosingCache.closed


def closed_caches() -> int:
    return ClosingCache.closed


@sensitive_variables("password")
def with_password(user: str, password: str) -> None:
    inside(user, password)


def inside(user: str, password: str) -> None:
    note = f"hello {user}"
    raise ValueError(note)


@sensitive_variables()
def with_secrets(token: str) -> None:
    raise ValueError("everything here is secret")


@sensitive_variables("password")
async def with_password_async(user: str, password: str) -> None:
    raise ValueError(user)


def run_async_with_password(user: str, password: str) -> None:
    # Passed on under another name, as callers do.
    asyncio.run(with_password_async(user, password))
