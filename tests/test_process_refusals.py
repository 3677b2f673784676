"""What cannot be run in a worker is refused before anything is sent, with the place and advice."""

from __future__ import annotations

import functools
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections

from leasepool_django import NotPicklableError
from leasepool_django.shortcuts import offload
from tests import process_jobs as jobs
from tests.process_pools import CALLERS, Caller, running

each_caller = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)


def nested() -> Callable[[], None]:
    def inner() -> None:
        """Cannot be found by a worker."""

    return inner


class FakeRedis:
    """As ``redis.Redis``: a client with a connection pool, which has a lock."""

    def __init__(self) -> None:
        self.connection_pool = FakeRedisPool()


class FakeRedisPool:
    def __init__(self) -> None:
        self._lock = threading.RLock()


FakeRedis.__module__ = "redis.client"

FUNCTIONS: list[tuple[Callable[..., Any], str, str]] = [
    (lambda: None, "fn", "is a lambda, which a worker cannot find"),
    (nested(), "fn", "is defined inside a function, where a worker cannot find it"),
    (jobs.coroutine, "fn", "is an asynchronous function; a worker runs plain functions"),
    (functools.partial(jobs.coroutine), "fn", "is an asynchronous function"),
    (
        jobs.Client().fetch,
        "fn.__self__.pool.lock",
        "_thread.lock. A lock works in one process only",
    ),
    (functools.partial(jobs.echo, threading.Lock()), "fn.args[0]", "_thread.lock"),
]


@each_caller
def test_a_function_that_no_worker_can_run_is_refused_before_it_is_sent(caller: Caller) -> None:
    with running() as manager:
        for function, path, text in FUNCTIONS:
            error = caller.outcome(manager, function)
            assert type(error) is NotPicklableError, function
            assert isinstance(error, TypeError)
            assert error.path == path
            assert text in str(error)
        assert untouched(manager)


def untouched(manager: Any) -> bool:
    """Whether no call of this manager has been begun, and its worker is there and free."""
    stats = manager.stats()
    worker = stats.pools[0].workers[0]
    return (stats.calls_started, stats.waiting, worker.state, worker.calls) == (0, 0, "idle", 0)


@each_caller
def test_an_argument_that_cannot_travel_is_refused_before_it_is_sent(caller: Caller) -> None:
    with socket.socket() as open_socket, Path(__file__).open() as file, running() as manager:
        for argument, inner, type_name, advice in [
            (threading.Lock(), "", "_thread.lock", "A lock works in one process only"),
            ({"a": [1, threading.Lock()]}, "['a'][1]", "_thread.lock", "A lock works in one"),
            (open_socket, "", "socket.socket", "send the address and open it in the worker"),
            (jobs.Client(), ".pool.lock", "_thread.lock", "A lock works in one process only"),
            (FakeRedis(), ".connection_pool._lock", "_thread.RLock", "holds open connections"),
            (file, "", "_io.TextIOWrapper", "send its path or its contents"),
        ]:
            error = caller.outcome(manager, jobs.echo, argument)
            assert type(error) is NotPicklableError, argument
            assert error.path == f"args[0]{inner}"
            assert error.type_name == type_name
            assert f"tests.process_jobs.echo cannot be sent to a worker: {error.path}" in str(error)
            assert advice in str(error)
        assert untouched(manager)


@each_caller
@pytest.mark.django_db
def test_a_database_connection_is_refused_with_advice(caller: Caller) -> None:
    connection.ensure_connection()
    with running() as manager, connection.cursor() as cursor:
        for argument in (connection, connections["default"], connection.connection, cursor):
            error = caller.outcome(manager, jobs.echo, argument)
            assert type(error) is NotPicklableError
            assert "cannot be sent to a worker: args[0]" in str(error)
            assert "use django.db inside the function" in str(error)
        assert untouched(manager)


def test_a_keyword_argument_goes_by_its_name() -> None:
    with running() as manager:
        with pytest.raises(NotPicklableError) as caught:
            manager.run_sync(jobs.echo, 1, client=jobs.Client())
        assert caught.value.path == "kwargs['client'].pool.lock"
        assert untouched(manager)


def test_a_bound_method_whose_object_can_travel_is_run() -> None:
    with running() as manager:
        assert manager.run_sync(jobs.Greeter("Hello").greet, "reader") == "Hello, reader"
        assert manager.run_sync(functools.partial(jobs.echo, 3)) == 3
        assert manager.run_sync(jobs.cached, 4) == 8
        assert manager.run_sync(os.path.join, "a", "b") == "a/b"


def test_a_refusal_costs_the_calls_around_it_nothing(tmp_path: Path) -> None:
    """It needs no worker, so it comes at once while all are busy and others wait."""
    with running() as manager:
        for caller in CALLERS:
            folder = tmp_path / caller.name
            folder.mkdir()
            (folder / "go").touch()
            held, refused, waited = caller.outcomes(
                manager,
                [(jobs.hold, folder), (jobs.echo, threading.Lock()), (jobs.echo, "waited")],
            )
            assert isinstance(held, int)
            assert type(refused) is NotPicklableError
            assert waited == "waited"


@pytest.mark.parametrize(
    ("made", "advice"),
    [
        (lambda: offload(lambda: 1), "is a lambda, which a worker cannot find"),
        (lambda: offload(jobs.return_lambda()), "is a lambda, which a worker cannot find"),
        (lambda: functools.partial(offload(lambda: 1)), "is a lambda, which a worker"),
        (lambda: functools.lru_cache(nested()), "is defined inside a function, where a worker"),
    ],
)
def test_what_a_decorator_makes_of_a_local_function_gets_the_same_advice(
    made: Callable[[], Callable[[], Any]], advice: str
) -> None:
    with running() as manager, pytest.raises(NotPicklableError, match=advice):
        manager.run_sync(made())
