"""What a worker does for Django: the ``hooks`` of the process backend under Django.

``capture`` runs in the server, on every call; everything else runs in the fork server or in a
worker. ``capture``, ``enter`` and ``leave`` are on the path of every call, so they do nothing that
was not asked for. No database connection is ever shared with the server or left broken for the
next call.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import threading
from collections.abc import Callable
from contextvars import Context, ContextVar
from functools import cache
from typing import Any

import django
from asgiref.sync import SyncToAsync
from django.apps import apps
from django.conf import UserSettingsHolder, global_settings, settings
from django.core import mail
from django.core.cache import caches
from django.core.cache.backends.base import BaseCache
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, reset_queries
from django.db.backends.signals import connection_created
from django.utils import timezone, translation
from django.utils.module_loading import import_string
from django.utils.translation import trans_real

from ...worker import in_worker
from .django_frames import frame_locals
from .django_testing import Tests, describe_tests, follow_tests, report_mail
from .preparation import flush_streams

__all__ = [
    "UNKNOWN",
    "active_value",
    "capture",
    "describe_tests",
    "enter",
    "follow_tests",
    "frame_locals",
    "leave",
    "prepare",
    "template",
    "tidy_connections",
]

logger = logging.getLogger("leasepool_django.worker")

# Language: a code, or None where translations are switched off. Time zone: a key of the zone
# database, or (seconds from UTC, name). The third is there during a test run only.
Zone = str | tuple[float, str]
Captured = tuple[str | None, Zone] | tuple[str | None, Zone, Tests]

# Holds "outbox" during every test run, and rarely else: what costs nothing to look at.
_mail = vars(mail)


def _refused() -> dict[type, str]:
    """Types of arguments that are refused although pickle may take them, and why."""
    if in_worker():  # which sends no calls, and is ready sooner without these modules
        return {}
    from django.core.handlers.asgi import ASGIRequest
    from django.core.handlers.wsgi import WSGIRequest
    from django.http import HttpRequest

    why = "a request belongs to its connection. Send the data of it that the function needs"
    return {HttpRequest: why, WSGIRequest: why, ASGIRequest: why}


REFUSED = _refused()


# -- set-up -----------------------------------------------------------------------------------


def prepare(preload: Callable[[], None] | None = None) -> None:
    """Set Django up, then close what its start has opened. Once, before workers are forked.

    ``preload`` imports the preload modules: after the set-up, since they may need models, or
    before it where settings are still missing, since one of them may bring these.
    Raises ``ImproperlyConfigured`` if the project's settings cannot be found from here.
    """
    if preload is not None and not _has_settings():
        preload()
    if not _has_settings():
        raise ImproperlyConfigured(
            "Workers cannot find the project's settings: DJANGO_SETTINGS_MODULE is not in the "
            "environment, and settings.configure() was not called while the main module and the "
            "preload modules were imported. Set the variable before the pool starts (manage.py "
            "and asgi.py do), or call settings.configure() in a module and name that module in "
            "OPTIONS['preload']; in the main module the call must not stand under "
            "`if __name__ == '__main__':`."
        )
    if not apps.ready:
        django.setup()
    if preload is not None:
        preload()
    _close_everything()
    connection_created.connect(_opened.add, dispatch_uid=f"{__name__}.opened")
    if settings.USE_I18N:
        # Loading a language takes many milliseconds; workers share what is loaded here.
        translation.activate(settings.LANGUAGE_CODE)
        translation.deactivate()
    flush_streams()


def _has_settings() -> bool:
    return settings.configured or bool(os.environ.get("DJANGO_SETTINGS_MODULE"))


def _close_everything() -> None:
    reset_queries()
    for connection in connections.all(initialized_only=True):
        connection.close()
        # A connection pool has threads, which a fork does not copy.
        close_pool = getattr(connection, "close_pool", None)
        if close_pool is not None:
            close_pool()
        del connections[connection.alias]
    caches.close_all()
    _closing_caches()


# -- the caller's context ---------------------------------------------------------------------

UNKNOWN = object()
# Where LazySettings keeps what it was asked for, until that changes: to ask it takes 0.3 µs.
_kept = vars(settings)


def capture() -> Captured | None:
    """Return the caller's active language and time zone; ``None`` if a worker has them anyway."""
    if "outbox" in _mail and (tests := describe_tests()) is not None:
        return translation.get_language(), portable_zone(timezone.get_current_timezone()), tests
    default = _worker_defaults()
    active, zone = active_value(trans_real), active_value(timezone)
    if active is None and zone is None:
        kept = _kept.get("LANGUAGE_CODE"), _kept.get("TIME_ZONE")
        if kept == default:
            return None
    language: str | None
    if active is None:
        language = settings.LANGUAGE_CODE
    elif isinstance(active, trans_real.DjangoTranslation):
        language = active.to_language()
    else:
        language = translation.get_language()
    key: str | None
    if zone is None:
        key = settings.TIME_ZONE
    else:
        if zone is UNKNOWN:
            zone = timezone.get_current_timezone()
        key = getattr(zone, "key", None)
        if key is None:
            return language, portable_zone(zone)
    captured = language, key
    return None if captured == default else captured


def active_value(module: Any) -> Any:
    """What is active in a module that keeps it in an asgiref ``Local``; ``None`` if nothing is.

    ``UNKNOWN`` if only the ``Local`` can tell: to ask it costs 1.3 µs for each call, and 3 µs when
    nothing is active.
    """
    try:
        variable = module._active._storage._data  # private: see above; without it, only slower
        if not isinstance(variable, ContextVar):
            return UNKNOWN
        values = variable.get(None)
        if values is None:
            return None
        if type(values) is not dict:  # since asgiref 3.12 marked with the thread it belongs to
            values = values.data if values.thread_id == threading.get_ident() else {}
        return values.get("value")
    except AttributeError:
        return UNKNOWN


@cache
def _worker_defaults() -> Captured:
    """The language and time zone of a worker in which nothing is activated.

    Workers know the project's own settings, and nothing of a test's overrides here.
    """
    own: Any = settings
    own.LANGUAGE_CODE  # noqa: B018 - loads the settings
    own = own._wrapped  # private: there is no other way to look below overrides
    while isinstance(own, UserSettingsHolder) and own.default_settings is not global_settings:
        own = own.default_settings
    return own.LANGUAGE_CODE, own.TIME_ZONE


def portable_zone(zone: dt.tzinfo) -> str | tuple[float, str]:
    """What stands for a zone: the name that zoneinfo or pytz gives it, or the present offset."""
    for attribute in ("key", "zone"):
        name = getattr(zone, attribute, None)
        if isinstance(name, str):
            return name
    offset = zone.utcoffset(None)
    if offset is None:
        offset = dt.datetime.now(zone).utcoffset() or dt.timedelta()
    return offset.total_seconds(), zone.tzname(None) or str(zone)


_templates: dict[Captured, Context] = {}
MOST_TEMPLATES = 1000


def template(captured: Captured | None) -> Context | None:
    """Return a context in which ``captured`` is active, to be copied for a call.

    ``None`` if there is nothing to prepare, or nothing that can be prepared: then ``enter`` does
    all. To copy a context takes a fraction of activating a language and a time zone.
    """
    if captured is None:
        return None
    context = _templates.get(captured)
    if context is None:
        if len(captured) > 2:
            return None  # a test may have changed anything since the call before
        if len(_templates) >= MOST_TEMPLATES:
            _templates.clear()
        context = Context()
        context.run(enter, captured)
        _templates[captured] = context  # not before: it may have raised
    return context


def enter(captured: Captured | None) -> None:
    """Activate the caller's language and time zone, and forget queries logged before."""
    if captured is not None:
        language, zone, *tests = captured
        if tests:
            follow_tests(tests[0])
        if language is None:
            translation.deactivate_all()
        else:
            translation.activate(language)
        if isinstance(zone, str):
            timezone.activate(zone)
        else:
            timezone.activate(dt.timezone(dt.timedelta(seconds=zone[0]), zone[1]))
    if _opened.any:
        reset_queries()


# -- connections ------------------------------------------------------------------------------


class _Opened:
    """Whether this worker has database connections, so that calls without any cost nothing."""

    def __init__(self) -> None:
        self.any = False
        self.elsewhere = False

    def add(self, **_: object) -> None:
        """Receive ``connection_created``, in the thread that connects."""
        if threading.current_thread() is threading.main_thread():
            self.any = True
        else:
            self.elsewhere = True


_opened = _Opened()


def leave() -> None:
    """Leave no database connection broken, too old or inside a transaction, and no cache open."""
    if _opened.any:
        _opened.any = tidy_connections()
    if _opened.elsewhere:
        # asyncio.run() in a function runs the ORM on asgiref's one thread, which stays, and
        # serves the next call as well. It does this first.
        _opened.elsewhere = False
        SyncToAsync.single_thread_executor.submit(_tidy_thread)
    for alias in _closing_caches():
        _close_cache(alias)
    if "outbox" in _mail:
        report_mail()


def tidy_connections() -> bool:
    """Tidy this thread's connections; whether one is still open."""
    still_open = False
    for connection in connections.all(initialized_only=True):
        connection.queries_log.clear()
        try:
            if connection.in_atomic_block or connection.needs_rollback:
                # Closed in a transaction, a connection waits for the end of its atomic block,
                # which will not come: the next call gets a new one.
                connection.close()
                del connections[connection.alias]
                continue
            connection.close_if_unusable_or_obsolete()
        except Exception:
            logger.warning(
                "The database connection %r could not be tidied after a call; it is dropped",
                connection.alias,
                exc_info=True,
            )
            del connections[connection.alias]
            continue
        still_open = still_open or connection.connection is not None
    return still_open


def _tidy_thread() -> None:
    if tidy_connections():
        _opened.elsewhere = True


@cache
def _closing_caches() -> tuple[str, ...]:
    """The aliases of caches whose backend has something to close.

    A call has a context of its own, and so its own cache objects; most need no closing.
    """
    return tuple(alias for alias in caches if _has_close(caches.settings[alias]["BACKEND"]))


def _has_close(path: str) -> bool:
    try:
        backend = import_string(path)
    except ImportError:
        return True  # whoever uses the cache gets the error
    return getattr(backend, "close", None) is not BaseCache.close


def _close_cache(alias: str) -> None:
    try:
        if any(used is caches[alias] for used in caches.all(initialized_only=True)):
            caches[alias].close()
    except Exception:
        logger.warning("The cache %r could not be closed after a call", alias, exc_info=True)
