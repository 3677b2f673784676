"""The options of the inline backend: those of processes, so that settings change by one word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from django.core import checks
from django.core.exceptions import ImproperlyConfigured

from leasepool_django import (
    ExecutorBackend,
    LeasedExecutorManager,
    LeasePoolError,
    WorkerStartError,
    pools,
    run_in_pool_sync,
)
from leasepool_django.backends.base import resolve
from tests import inline_jobs as jobs
from tests import jobs as common
from tests.managers import new_manager
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    yield
    jobs.initialized.clear()


PROCESS_OPTIONS: dict[str, Any] = {
    "preload": ["tests.pages"],
    "mp_context": "spawn",
    "max_tasks_per_child": 1,
    "max_rss_per_child": 1 << 20,
    "max_shared_bytes": 1 << 20,
    "nice": 5,
    "scheduling": "normal",
    "start_timeout": 5,
}


def test_settings_for_processes_are_settings_for_inline(settings: Settings) -> None:
    alias = {
        "WORKERS_PER_POOL": 3,
        "FORWARD_LOGS": True,
        "CONTEXT": ["tests.inline_jobs.request_id"],
        "OPTIONS": {
            **PROCESS_OPTIONS,
            "initializer": "tests.inline_jobs.initialize",
            "initargs": ["eu"],
        },
    }
    settings.LEASEPOOL = {"default": alias}
    of_processes = pools["default"]
    settings.LEASEPOOL = {"default": {**alias, "BACKEND": "inline"}}
    assert of_processes.backend == "process"
    assert pools["default"].backend == "inline"
    assert [problem for problem in checks.run_checks() if problem.id == "leasepool.E016"] == []
    assert [run_in_pool_sync(common.add, n) for n in range(3)] == [0, 1, 2]
    pools.reset()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"initialiser": print}, "no option 'initialiser'"),
        ({"mp_context": "fork"}, "'fork' is refused"),
        ({"nice": 20}, "from 0 to 19, not 20"),
        ({"start_timeout": 0}, "start_timeout must be more than 0"),
        ({"initializer": lambda: None}, "lambda"),
        ({"preload": "tests.pages"}, "preload must be a list"),
        ({"context": ["tests.inline_jobs.keep"]}, "neither a ContextVar"),
    ],
)
def test_bad_options_are_refused_as_for_processes(options: dict[str, Any], said: str) -> None:
    for backend in ("process", "inline"):
        with pytest.raises((TypeError, ValueError, LeasePoolError), match=said):
            new_manager(backend=backend, **options)


def test_the_initializer_runs_once_each_time_the_manager_starts() -> None:
    manager = new_manager(
        3, backend=ExecutorBackend.INLINE, initializer=jobs.initialize, initargs=("eu",)
    )
    pid = common.whoami()[0]
    for times in (1, 2):
        manager.start_sync()
        wait_until(lambda: manager.stats().idle_workers == 3)
        assert jobs.initialized == [(pid, "eu")] * times
        manager.stop_sync()


def test_an_initializer_that_fails_fails_the_start(settings: Settings) -> None:
    settings.LEASEPOOL = {
        "default": {
            "BACKEND": "inline",
            "OPTIONS": {"initializer": "tests.django_jobs.refuse_to_start"},
        }
    }
    with pytest.raises(WorkerStartError, match="no licence found") as raised:
        pools.start_all_sync()
    assert isinstance(raised.value.__cause__, ImproperlyConfigured)
    assert "refuse_to_start" in (raised.value.traceback_text or "")
    pools.reset()


def test_it_says_honestly_what_it_can_do() -> None:
    backend = resolve("inline")
    assert not backend.supports_kill
    assert not backend.supports_isolation
    assert not backend.supports_log_forwarding
    assert not backend.supports_prompt_deadlines
    with pytest.raises(ValueError, match="forwards logs"):
        LeasedExecutorManager(backend="inline", max_pools=1, forward_process_logs=True)
