"""Test runs: workers use the databases and the mail backend that the test process has.

Django's test runner and pytest-django give the test process databases of its own and a mail
backend that sends nothing; workers, which read the project's settings, would know nothing of that.
So a test process tells with each call what it has (``describe_tests``), and a worker follows
(``follow_tests``): it connects to the test's databases and refuses all others.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any, NamedTuple

from django.conf import settings
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

__all__ = ["Tests", "describe_tests", "follow_tests", "report_mail"]

logger = logging.getLogger("leasepool_django.worker")

# What says which database an alias is.
IDENTITY = ("ENGINE", "NAME", "HOST", "PORT", "USER", "PASSWORD")
_Identity = tuple[str, ...]

# The mail backends of Django that need no settings and send nothing.
HARMLESS = frozenset(
    f"django.core.mail.backends.{name}.EmailBackend" for name in ("console", "dummy", "locmem")
)
LOCMEM = "django.core.mail.backends.locmem.EmailBackend"

Tests = tuple[
    tuple[tuple[str, _Identity], ...],  # alias, and which database it is in the test process
    tuple[str, ...],  # aliases for which the caller is in the transaction of a TestCase
    str | tuple[tuple[str, str], ...],  # mail backend, or those of settings.MAILERS
]


# -- the test process -------------------------------------------------------------------------


def describe_tests() -> Tests | None:
    """Tell which databases and mail backends this process uses; ``None`` if no test run is on."""
    utils = sys.modules.get("django.test.utils")
    # Nothing else tells a test run from a process that only uses the locmem backend.
    if utils is None or not hasattr(utils._TestState, "saved_data"):  # private: see above
        return None
    return (
        tuple((alias, _identity(database)) for alias, database in connections.settings.items()),
        tuple(
            connection.alias
            for connection in connections.all(initialized_only=True)
            if any(getattr(block, "_from_testcase", False) for block in connection.atomic_blocks)
        ),
        _mail_backends(),
    )


def _identity(database: dict[str, Any]) -> _Identity:
    return tuple(str(database.get(key) or "") for key in IDENTITY)


def _mail_backends() -> str | tuple[tuple[str, str], ...]:
    mailers = getattr(settings, "MAILERS", None)  # Django 6.1 and later
    if mailers is None:
        return _harmless(_unwrapped().EMAIL_BACKEND)
    return tuple((alias, _harmless(mailer.get("BACKEND"))) for alias, mailer in mailers.items())


def _unwrapped() -> Any:
    # From Django 6.1 on, settings warn whoever asks them for EMAIL_BACKEND, or sets it.
    wrapper: Any = settings
    return wrapper._wrapped  # private: there is no other way to look below the warning


def _harmless(backend: str | None) -> str:
    # Others may send, or need settings that a worker does not have.
    return backend if backend in HARMLESS else LOCMEM


# -- a worker ---------------------------------------------------------------------------------


class _Following(NamedTuple):
    """What a worker has taken over. ``own``: the databases of the project's settings."""

    tests: Tests
    own: dict[str, _Identity]
    refusals: dict[str, str]


class _State:
    """The main thread's; connections of other threads read it."""

    following: _Following | None = None


_state = _State()


def follow_tests(tests: Tests) -> None:
    """Use what the test process uses. Before each call of a test run; quick if nothing changed."""
    following = _state.following
    if following is not None and following.tests == tests:
        return
    if following is None:
        _guard_connections()
        own = {alias: _identity(database) for alias, database in connections.settings.items()}
    else:
        own = following.own
    databases, _, backends = tests
    if following is None or following.tests[0] != databases:
        refusals = _use_databases(dict(databases), own)
    else:
        refusals = following.refusals
    if isinstance(backends, str):
        _unwrapped().EMAIL_BACKEND = backends
        vars(settings).pop("EMAIL_BACKEND", None)  # cached there
    else:
        settings.MAILERS = {alias: {"BACKEND": backend} for alias, backend in backends}
    _state.following = _Following(tests, own, refusals)


def _use_databases(databases: dict[str, _Identity], own: dict[str, _Identity]) -> dict[str, str]:
    """Let new connections go where those of the test process go; returns why some may not."""
    for connection in connections.all(initialized_only=True):
        connection.close()
        del connections[connection.alias]
    refusals = {}
    for alias, database in connections.settings.items():
        identity = databases.get(alias, own[alias])
        refusal = _refusal(alias, identity, own[alias], database)
        if refusal is not None:
            refusals[alias] = refusal
            continue
        # In place, as Django's test runner does it: connections of all threads share it.
        database.update(zip(IDENTITY, identity, strict=True))
        # The test process drops its databases, which must then be in nobody's use.
        database["CONN_MAX_AGE"] = 0
        database["OPTIONS"] = {
            name: value for name, value in database["OPTIONS"].items() if name != "pool"
        }
    return refusals


def _refusal(
    alias: str, identity: _Identity, own: _Identity, database: dict[str, Any]
) -> str | None:
    name = identity[1]
    if name == ":memory:" or "mode=memory" in name:
        return (
            f"The test database of {alias!r} is an SQLite database in the memory of the test "
            "process, which no worker process can see. Give it a file: "
            f"DATABASES[{alias!r}]['TEST'] = {{'NAME': BASE_DIR / 'test.sqlite3'}}, and use "
            "TransactionTestCase (pytest: @pytest.mark.django_db(transaction=True)). Or let calls "
            "run in the test process: LEASEPOOL['default']['BACKEND'] = 'inline'."
        )
    is_test_database = str(database["TEST"].get("NAME") or "") == own[1]
    if identity[:4] == own[:4] and not is_test_database:
        return (
            f"Workers refuse the database {alias!r} ({name}) during a test run: it is the "
            "project's real one, since the test process has not replaced it (yet). A test that "
            "uses the database must say so: TransactionTestCase with this alias in `databases`, "
            "or @pytest.mark.django_db(transaction=True). If tests are meant to use this very "
            f"database, set DATABASES[{alias!r}]['TEST'] = {{'NAME': {name!r}}}."
        )
    return None


def _guard_connections() -> None:
    """Have every new connection, in all threads, looked at before it is made."""
    connect = BaseDatabaseWrapper.connect

    @functools.wraps(connect)
    def connect_if_allowed(self: BaseDatabaseWrapper) -> None:
        following = _state.following
        if following is not None:
            refusal = following.refusals.get(self.alias)
            if refusal is not None:
                raise ImproperlyConfigured(refusal)
            if self.alias in following.tests[1]:
                logger.warning(
                    "A function uses the database %r while its caller is in the transaction of a "
                    "TestCase. A worker has a connection of its own: it does not see what the "
                    "test has written, and may wait for its locks. Use TransactionTestCase "
                    "(pytest: @pytest.mark.django_db(transaction=True)) or BACKEND 'inline'.",
                    self.alias,
                )
        connect(self)

    BaseDatabaseWrapper.connect = connect_if_allowed  # type: ignore[method-assign]


def report_mail() -> None:
    """After a call of a test run: say what mail it sent, which the test cannot find."""
    outbox = getattr(mail, "outbox", None)
    if _state.following is None or not outbox:
        return
    logger.warning(
        "A function has sent %d message(s) in a worker: %s. They are in the worker's mail.outbox, "
        "not in the test's, and were not delivered. Use BACKEND 'inline' to test for mail.",
        len(outbox),
        ", ".join(repr(message.subject) for message in outbox),
    )
    outbox.clear()
