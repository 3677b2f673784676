"""Database connections on the notifier's thread, where size providers and receivers run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connections

from leasepool_django import pools, signals

from .waiting import wait_until

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from pytest_django import DjangoDbBlocker
    from pytest_django.fixtures import Settings


class Visitor:
    """Queries the database, and notes whether it found an open connection."""

    def __init__(self) -> None:
        self.found_open: list[bool] = []
        self.connections: list[BaseDatabaseWrapper] = []

    def forget(self) -> None:
        self.found_open.clear()
        self.connections.clear()

    def visit(self) -> int:
        connection = connections["default"]
        self.connections.append(connection)
        self.found_open.append(connection.connection is not None)
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        return 0

    def has_left(self, visits: int) -> bool:
        """Whether it has been there so often, and its connections are closed."""
        return len(self.found_open) >= visits and all(
            connection.connection is None for connection in self.connections
        )


visitor = Visitor()


def visit() -> int:
    return visitor.visit()


def receive(**_: Any) -> None:
    visitor.visit()


@pytest.fixture(params=["size provider", "receiver"])
def visited(
    request: pytest.FixtureRequest, settings: Settings, django_db_blocker: DjangoDbBlocker
) -> Iterator[Any]:
    """Something that makes the visitor come; each time it is called it comes once or more."""
    visitor.forget()
    alias: dict[str, Any] = {"BACKEND": "thread", "WORKERS_PER_POOL": 1}
    if request.param == "size provider":
        alias["SIZE_PROVIDER"] = f"{__name__}.visit"
    else:
        signals.lease_acquired.connect(receive)
    settings.LEASEPOOL = {"default": alias}

    def come() -> None:
        if request.param == "size provider":
            pools["default"].notify_scale_changed()
        else:
            with pools["default"].lease_sync():
                pass

    try:
        with django_db_blocker.unblock():
            pools["default"].start_sync()
            yield come
            pools.reset()
    finally:
        signals.lease_acquired.disconnect(receive)


@contextmanager
def one_more() -> Iterator[None]:
    before = len(visitor.found_open)
    yield
    wait_until(lambda: len(visitor.found_open) > before, message="nobody came")


def test_a_connection_ends_with_its_work_as_it_does_with_a_request(visited: Any) -> None:
    """CONN_MAX_AGE is 0, as it is by default."""
    for _ in range(3):
        with one_more():
            visited()
    wait_until(lambda: visitor.has_left(3), message="a connection stays open")
    assert set(visitor.found_open) == {False}


def test_a_connection_that_broke_is_replaced(visited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that may be kept is, as long as it works."""
    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", None)
    for _ in range(2):
        with one_more():
            visited()
    assert visitor.found_open[-1:] == [True]
    broken = visitor.connections[-1]
    monkeypatch.setattr(broken, "is_usable", lambda: False)
    broken.errors_occurred = True  # as it is after a query that failed
    with one_more():
        visited()
    assert visitor.found_open[-1:] == [False]
    broken.settings_dict["CONN_MAX_AGE"] = 0
    broken.close_at = 0.0
    with one_more():
        visited()
    wait_until(lambda: visitor.has_left(4), message="a connection stays open")
