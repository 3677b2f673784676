"""What a manager is made with: bad values are refused at once, by argument and value."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import (
    ExecutorBackend,
    LeasedExecutorManager,
    UnsupportedBackendError,
    WorkerStartError,
)
from leasepool_django.backends.base import resolve
from leasepool_django.engine import ProcessLoggingConfig
from leasepool_django.engine.config import duration, log_level
from tests import jobs
from tests.managers import running

COUNTS = ["max_pools", "min_pools", "workers_per_pool", "units_per_pool", "max_waiting"]
DURATIONS = ["check_interval", "default_lease_seconds", "acquire_timeout", "call_timeout"]
GRACES = ["lease_grace_seconds", "shutdown_grace_seconds"]
NO_COUNTS = [True, 1.0, "2", math.inf, 0, -1]
NO_NUMBERS = [True, "5", [1]]
NO_DURATIONS = [*NO_NUMBERS, 0, -0.5, math.inf, -math.inf, math.nan, 10**400]

BAD: list[tuple[str, Any]] = [
    *((name, value) for name in COUNTS for value in NO_COUNTS),
    *((name, None) for name in COUNTS if name != "max_waiting"),
    *((name, value) for name in DURATIONS for value in NO_DURATIONS),
    *((name, value) for name in GRACES for value in [*NO_NUMBERS, -0.5, math.inf, math.nan, None]),
    *((name, value) for name in [*DURATIONS, *GRACES] for value in [1e10, 10**400, -(10**400)]),
    *((name, None) for name in ("check_interval", "default_lease_seconds")),
    ("size_provider", 5),
    ("size_provider", jobs.add),
    ("size_provider", asyncio.sleep),
    ("name_prefix", None),
    ("name_prefix", 5),
    ("name_prefix", ""),
    ("logger", "leasepool"),
    ("forward_process_logs", "yes"),
    ("clear_process_log_handlers", 0),
    ("process_logging", {"level": "INFO"}),
    ("process_log_level", "LOUD"),
    ("process_log_level", -1),
    ("process_log_level", True),
    ("process_log_level", 1.5),
    ("process_log_target_logger", 5),
]


def test_every_bad_value_is_refused_by_its_argument_and_value() -> None:
    for name, value in BAD:
        with pytest.raises((TypeError, ValueError)) as raised:
            LeasedExecutorManager(**{"backend": "thread", "max_pools": 1, name: value})
        assert name in str(raised.value), (name, value)
        assert repr(value) in str(raised.value) or value == "", (name, value)


def test_a_duration_may_be_as_long_as_a_thread_can_wait() -> None:
    assert duration("seconds", threading.TIMEOUT_MAX) == threading.TIMEOUT_MAX
    with pytest.raises(ValueError, match=r"seconds must be at most \d+ seconds, .*wait"):
        duration("seconds", math.nextafter(threading.TIMEOUT_MAX, math.inf))


def test_a_number_that_python_does_not_write_is_refused_as_well() -> None:
    with pytest.raises(ValueError, match=r"call_timeout must be at most .* integer of 16610 bits"):
        LeasedExecutorManager(backend="thread", max_pools=1, call_timeout=10**5000)


class Load:
    """A load that is asked for in several ways."""

    async def __call__(self) -> int:
        return 0

    def units(self, factor: int = 1) -> int:
        return factor

    @staticmethod
    async def later() -> int:
        return 0

    def times(self, factor: int) -> int:
        return factor


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        (Load(), "it is a coroutine function"),
        (Load.later, "it is a coroutine function"),
        (partial(Load.later), "it is a coroutine function"),
        (Load().times, "it cannot be called without arguments: missing .*'factor'"),
        (Load.units, "it cannot be called without arguments: missing .*'self'"),
        (7, "it is not callable"),
    ],
)
def test_a_size_provider_is_a_plain_function_without_arguments(provider: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=f"size_provider must be .*: {reason}"):
        LeasedExecutorManager(backend="thread", max_pools=1, size_provider=provider)


@pytest.mark.parametrize("provider", [Load().units, partial(Load().times, 2), int, lambda: 1])
def test_a_size_provider_may_be_anything_that_can_be_called_like_that(provider: Any) -> None:
    LeasedExecutorManager(backend="thread", max_pools=1, size_provider=provider)


@pytest.mark.parametrize("level", [logging.WARNING, "WARNING", "warning", "WARN"])
def test_a_log_level_is_a_number_or_a_name(level: int | str) -> None:
    assert log_level("level", level) == logging.WARNING


def test_there_must_not_be_more_pools_at_least_than_at_most() -> None:
    with pytest.raises(ValueError, match="min_pools must not be above max_pools, but 3 > 2"):
        LeasedExecutorManager(backend="thread", min_pools=3, max_pools=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward_process_logs", True),
        ("process_log_level", "DEBUG"),
        ("process_log_target_logger", "workers"),
        ("clear_process_log_handlers", False),
    ],
)
def test_log_forwarding_is_asked_for_in_one_way(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"either process_logging or {name}, not both"):
        LeasedExecutorManager(max_pools=1, process_logging=ProcessLoggingConfig(), **{name: value})
    LeasedExecutorManager(max_pools=1, process_logging=ProcessLoggingConfig())


def test_the_numbers_of_pools_and_workers_can_be_read_back() -> None:
    manager = LeasedExecutorManager(
        backend="thread", max_pools=3, workers_per_pool=5, name_prefix="reports"
    )
    assert (manager.max_pools, manager.workers_per_pool) == (3, 5)
    assert (manager.name, manager.backend, manager.started) == ("reports", "thread", False)


# --- backends -------------------------------------------------------------------------------------


class Unfinished(Executor):
    """Does not say how anything is run."""


class Immediate(Executor):
    """Runs what is submitted at once."""

    def __init__(self, max_workers: int, **options: Any) -> None:
        self.options = options

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Rejecting(Immediate):
    """Has options that cannot be known, and takes none of them."""

    def __init__(self, max_workers: int, **options: Any) -> None:
        raise TypeError(f"no such options: {options}")


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("thread", "thread"),
        (ExecutorBackend.THREAD, "thread"),
        ("process", "process"),
        (ExecutorBackend.PROCESS, "process"),
        (
            "concurrent.futures.ThreadPoolExecutor",
            "concurrent.futures.thread.ThreadPoolExecutor",
        ),
        (ThreadPoolExecutor, "concurrent.futures.thread.ThreadPoolExecutor"),
        ("leasepool_django.backends.executor.ThreadBackend", "thread"),
    ],
)
def test_a_backend_is_a_name_a_member_a_class_or_a_dotted_path(backend: Any, name: str) -> None:
    assert LeasedExecutorManager(backend=backend, max_pools=1).backend == name
    assert resolve(backend) is resolve(backend)


@pytest.mark.parametrize(
    "backend",
    [
        "",
        "nonsense",
        "no.such.module",
        "os.no_such_name",
        "math.pi",
        "builtins.dict",
        "..relative",
        "os.",
        "concurrent.futures.Executor",
        Executor,
        "leasepool_django.backends.base.Backend",
        Unfinished,
        5,
        None,
    ],
)
def test_what_is_no_backend_is_refused(backend: Any) -> None:
    with pytest.raises(UnsupportedBackendError) as raised:
        LeasedExecutorManager(backend=backend, max_pools=1)
    assert repr(backend) in str(raised.value)


def test_a_backend_whose_module_raises_is_refused_with_the_modules_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_backend.py").write_text("raise RuntimeError('no licence found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsupportedBackendError, match="RuntimeError: no licence found") as raised:
        LeasedExecutorManager(backend="raising_backend.Pool", max_pools=1)
    assert "'raising_backend.Pool'" in str(raised.value)


@pytest.mark.parametrize("backend", ["process", "inline"])
@pytest.mark.parametrize(
    ("hooks", "said"),
    [
        (3, "hooks must be the dotted path of a module, not 3"),
        ("no_such_module", "hooks .*'no_such_module' cannot be imported: ModuleNotFoundError"),
        ("json", r"hooks names 'json', which has no capture\(\)"),
    ],
)
def test_hooks_that_are_none_are_refused_by_argument_and_value(
    backend: str, hooks: Any, said: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        LeasedExecutorManager(backend=backend, max_pools=1, hooks=hooks)


@pytest.mark.parametrize("backend", ["process", "thread", "concurrent.futures.ProcessPoolExecutor"])
def test_an_unknown_option_is_named_together_with_the_known_ones(backend: str) -> None:
    with pytest.raises(TypeError, match=r"'colour'.*initializer"):
        LeasedExecutorManager(backend=backend, max_pools=1, colour="red")


def test_options_that_cannot_be_known_reach_the_executor() -> None:
    options: dict[str, Any] = {"colour": "red"}
    with running(backend=Immediate, **options) as manager:
        assert manager.run_sync(jobs.add, 1) == 1
    rejected = LeasedExecutorManager(backend=f"{__name__}.Rejecting", max_pools=1, **options)
    with pytest.raises(WorkerStartError, match=r"no such options: .*red"):
        rejected.start_sync()


# --- single calls and leases ----------------------------------------------------------------------


def test_bad_values_of_single_calls_are_refused_and_leave_nothing_waiting() -> None:
    async def main() -> None:
        for value in [*NO_COUNTS, 3]:
            with pytest.raises((TypeError, ValueError), match="workers"):
                await manager.acquire(workers=value)  # type: ignore[arg-type]
        for value in [*NO_NUMBERS, 0, -1, math.nan]:
            with pytest.raises((TypeError, ValueError), match="lease_seconds"):
                await manager.acquire(lease_seconds=value)  # type: ignore[arg-type]
        for value in NO_DURATIONS:
            with pytest.raises((TypeError, ValueError), match="timeout"):
                await manager.acquire(timeout=value)  # type: ignore[arg-type]
            with pytest.raises((TypeError, ValueError), match="timeout"):
                manager.options(timeout=value)  # type: ignore[arg-type]
            with pytest.raises((TypeError, ValueError), match="call_timeout"):
                manager.options(call_timeout=value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="owner must be text, not 5"):
            await manager.acquire(owner=5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="owner must be text, not 5"):
            manager.options(owner=5)  # type: ignore[arg-type]
        async with manager.lease() as lease:
            for value in [*NO_NUMBERS, 0, -1, math.nan, None]:
                with pytest.raises((TypeError, ValueError), match="seconds"):
                    await lease.extend(value)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="call_timeout"):
                lease.options(call_timeout=0)
        for value in [*NO_NUMBERS, -1, math.inf]:
            with pytest.raises((TypeError, ValueError), match="grace"):
                await manager.stop(grace=value)  # type: ignore[arg-type]
        assert manager.started

    with running(2) as manager:
        asyncio.run(main())
        with pytest.raises(ValueError, match=r"at most workers_per_pool \(2\), not 3"):
            manager.acquire_sync(workers=3)
        with pytest.raises(ValueError, match="grace"):
            manager.stop_sync(grace=-1)
        assert manager.stats().idle_workers == 2
        assert manager.stats().waiting == 0
