"""Calls on threads find what calls in worker processes find, and leave as little behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from django.db import connection, connections, transaction
from django.utils import timezone, translation

from leasepool_django import pools, run_in_pool, run_in_pool_sync
from tests import context_jobs

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


@pytest.fixture
def one_thread(settings: Settings) -> Iterator[None]:
    """One thread, so that every call finds what the one before has left."""
    settings.LEASEPOOL = {
        "default": {
            "BACKEND": "thread",
            "WORKERS_PER_POOL": 1,
            "CONTEXT": ["tests.context_jobs.doubling"],
        }
    }
    yield
    pools.reset()


def active() -> tuple[str | None, str, str]:
    return (
        translation.get_language(),
        timezone.get_current_timezone_name(),
        threading.current_thread().name,
    )


@pytest.mark.parametrize("way", ["async", "sync", "executor"])
def test_the_callers_language_and_time_zone_are_active(one_thread: None, way: str) -> None:
    async def ask() -> tuple[str | None, str, str]:
        return await run_in_pool(active)

    def call() -> tuple[str | None, str, str]:
        if way == "async":
            return asyncio.run(ask())
        if way == "sync":
            return run_in_pool_sync(active)
        with pools["default"].lease_sync() as lease:
            return lease.executor.submit(active).result(20)

    with translation.override("de"), timezone.override("Asia/Tokyo"):
        language, zone, thread = call()
    assert (language, zone) == ("de", "Asia/Tokyo")
    assert thread != threading.current_thread().name
    with translation.override(None), timezone.override("Europe/Oslo"):
        assert call()[:2] == (None, "Europe/Oslo")
    assert call()[:2] == active()[:2]


def test_carriers_capture_here_and_apply_there(one_thread: None) -> None:
    async def ask() -> tuple[str, str]:
        context_jobs.request_id.set("abc")
        return await run_in_pool(context_jobs.seen)

    assert asyncio.run(ask()) == ("abc", "tenant 6")


def use_connection() -> int:
    connection.ensure_connection()
    return id(connection.connection)


def leave_a_transaction_open() -> None:
    transaction.atomic().__enter__()
    connection.ensure_connection()


def open_connections() -> list[str]:
    return [
        each.alias
        for each in connections.all(initialized_only=True)
        if each.connection is not None or each.in_atomic_block
    ]


@pytest.mark.django_db(transaction=True)
def test_a_connection_is_closed_after_the_call_as_after_a_request(one_thread: None) -> None:
    run_in_pool_sync(use_connection)
    assert run_in_pool_sync(open_connections) == []


@pytest.mark.django_db(transaction=True)
def test_a_transaction_that_was_left_open_ends_with_its_call(one_thread: None) -> None:
    run_in_pool_sync(leave_a_transaction_open)
    assert run_in_pool_sync(open_connections) == []
    run_in_pool_sync(use_connection)
