"""The ``dask`` backend, beside what ``tests/contract`` holds it to: the cluster, and Django."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import pytest
from distributed import Client
from django.core.checks import run_checks
from django.utils import timezone, translation

from leasepool_django import (
    NotPicklableError,
    UnsupportedBackendError,
    WorkerCrashedError,
    WorkerStartError,
    pools,
    run_in_pool_sync,
)
from tests import dask_jobs, jobs
from tests.context_jobs import request_id
from tests.dask_cluster import cluster, running
from tests.managers import new_manager
from tests.process_jobs import echo
from tests.process_pools import run_program

SETTINGS = {"DJANGO_SETTINGS_MODULE": "tests.settings"}


@pytest.fixture(scope="module", autouse=True)
def address() -> Iterator[str]:
    """The scheduler of a cluster of two processes with one thread each."""
    with cluster(2, **SETTINGS) as found:
        # Dask keeps a thread for what is large, once there was something: no test's leak.
        with running(found) as manager:
            manager.run_sync(echo, bytes(30 << 20))
        yield found


@pytest.fixture
def dask_pools(address: str, settings: Any) -> Iterator[str]:
    settings.LEASEPOOL = {
        "default": {
            "BACKEND": "dask",
            "WORKERS_PER_POOL": 2,
            "CONTEXT": ["tests.context_jobs.request_id"],
            "OPTIONS": {"address": address},
        }
    }
    yield address
    pools.reset()


def test_a_call_finds_what_it_finds_in_a_worker_here(dask_pools: str) -> None:
    with translation.override("de"), timezone.override("Asia/Tokyo"):
        token = request_id.set("request 7")
        try:
            found = run_in_pool_sync(dask_jobs.surroundings)
        finally:
            request_id.reset(token)
    with Client(dask_pools, set_as_default=False) as client:
        assert found.pop("dask") in client.run(os.getpid).values()
    assert found == {
        "in_worker": True,
        "language": "de",
        "zone": "Asia/Tokyo",
        "model": "auth.User",
        "request_id": "request 7",
    }
    assert run_in_pool_sync(dask_jobs.surroundings)["request_id"] == "none"


@pytest.mark.usefixtures("dask_pools")
def test_its_workers_do_not_count_among_those_of_this_machine(settings: Any) -> None:
    entry = settings.LEASEPOOL["default"]
    settings.LEASEPOOL = {"default": {**entry, "WORKERS_PER_POOL": 1000}}
    assert [problem.id for problem in run_checks(tags=["leasepool"])] == []


def test_large_arguments_and_results_travel(address: str) -> None:
    array = np.arange(300_000)
    data = os.urandom(3_000_000)
    with running(address) as manager:
        for value in (data, [data, memoryview(data)], {"rows": data.hex()}):
            assert manager.run_sync(echo, value) == value
        back = manager.run_sync(echo, array)
        assert np.array_equal(back, array)
        assert back.flags.writeable


def test_errors_are_those_of_a_worker_here(address: str) -> None:
    with running(address) as manager:
        with pytest.raises(NotPicklableError, match="is a lambda, which a worker cannot find"):
            manager.run_sync(lambda: 1)
        with pytest.raises(NotPicklableError, match=r"The result of .* cannot be sent back"):
            manager.run_sync(open, os.devnull)
        with pytest.raises(UnsupportedBackendError, match="'dask' cannot tell on_progress"):
            manager.options(on_progress=print).run_sync(jobs.add, 1)
        with pytest.raises(WorkerCrashedError) as crash:
            manager.run_sync(jobs.die, 3)
        assert (crash.value.function, crash.value.exitcode) == ("tests.jobs.die", 3)
        assert "running tests.jobs.die exited with status 3" in str(crash.value)
        assert manager.run_sync(jobs.add, 1, 2) == 3


def test_there_are_as_many_seats_as_threads(address: str) -> None:
    with running(address, 2):
        second = new_manager(backend="dask", address=address)
        with pytest.raises(
            WorkerStartError, match=r"no seat left: its 2 worker\(s\) have 2 thread\(s\)"
        ):
            second.start_sync()
    second.start_sync()  # when they have been given back
    assert second.run_sync(jobs.add, 1) == 1
    second.stop_sync(grace=0)


def test_one_process_may_have_several_workers_of_dasks() -> None:
    """Each has its own seats, and says so."""
    with cluster(2, DASK_TESTS_THREADS="1") as threads, running(threads, 2) as manager:
        with ThreadPoolExecutor() as callers:
            began = time.monotonic()
            list(callers.map(lambda _: manager.run_sync(time.sleep, 4.0), range(2)))
            assert time.monotonic() - began < 8.0  # at the same time, and longer than beats take
        assert manager.stats().workers_crashed == 0


def test_a_cluster_of_another_project_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "other.settings")
    settings.LEASEPOOL = {"default": {"BACKEND": "dask", "OPTIONS": {"address": address}}}
    try:
        with pytest.raises(WorkerStartError, match="One cluster can serve one project"):
            pools["default"].start_sync()
    finally:
        pools.reset()


def test_a_scheduler_that_is_not_there_is_named() -> None:
    manager = new_manager(backend="dask", address="tcp://127.0.0.1:1", connect_timeout=0.2)
    with pytest.raises(WorkerStartError, match=r"at tcp://127\.0\.0\.1:1 cannot be reached within"):
        manager.start_sync()


def test_without_any_address_none_is_made_up() -> None:
    manager = new_manager(backend="dask")
    try:
        with (
            dask.config.set({"scheduler-address": None}),
            pytest.raises(WorkerStartError, match="Which Dask cluster"),
        ):
            manager.start_sync()
    finally:
        manager.stop_sync(grace=0)


def test_without_an_address_dasks_own_configuration_counts(address: str) -> None:
    with dask.config.set({"scheduler-address": address}):
        manager = new_manager(backend="dask")
        manager.start_sync()
    assert manager.run_sync(jobs.add, 1) == 1
    manager.stop_sync(grace=0)


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    text = """
        import sys
        sys.modules["distributed"] = None
        from leasepool_django import LeasedExecutorManager, UnsupportedBackendError
        try:
            LeasedExecutorManager(backend="dask", max_pools=1)
        except UnsupportedBackendError as error:
            print(error)
    """
    ended = run_program(tmp_path, text)
    assert "pip install 'leasepool-django[dask]'" in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"adress": "tcp://x"}, TypeError, "has no option 'adress'"),
        ({"address": 5}, TypeError, "address must be a string, not 5"),
        ({"connect_timeout": 0}, ValueError, "connect_timeout"),
        ({"nice": 50}, ValueError, "nice must be from 0 to 19"),
        ({"forward_process_logs": True}, ValueError, "'dask' does not"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        new_manager(backend="dask", **options)
