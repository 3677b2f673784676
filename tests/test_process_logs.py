"""What workers log is handled by this process, in the caller's context, before the result."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import LeasedExecutorManager, WorkerCrashedError
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import CALLERS, Caller, running
from tests.waiting import async_wait_until, wait_until

each_caller = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)


class Collector(logging.Handler):
    """Keeps records, each with the request id that its handler saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[logging.LogRecord, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((record, jobs.request_id.get()))

    @property
    def records(self) -> list[logging.LogRecord]:
        return [record for record, _ in self.seen]

    @property
    def texts(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@contextmanager
def collecting(name: str) -> Iterator[Collector]:
    """Let a collector handle what the logger ``name`` and those below it get."""
    logger, collector, level = logging.getLogger(name), Collector(), logging.getLogger(name).level
    logger.addHandler(collector)
    logger.setLevel(logging.DEBUG)
    try:
        yield collector
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)


@pytest.fixture
def collected() -> Iterator[Collector]:
    with collecting("tests") as collector:
        yield collector


@contextmanager
def forwarding(workers: int = 1, **options: Any) -> Iterator[LeasedExecutorManager]:
    with running(workers, forward_process_logs=True, **options) as manager:
        yield manager


# --- the way to the parent -------------------------------------------------------------------


@each_caller
def test_records_are_handled_before_the_result_arrives(
    caller: Caller, collected: Collector
) -> None:
    with forwarding() as manager:
        worker = caller(manager, jobs.log, "first", "second")
        assert collected.texts == ["first", "second"]
    for record in collected.records:
        assert record.name == "tests.worker"
        assert record.process == worker
        assert record.processName == "leasepool-worker"
        assert record.funcName == "log"
        assert record.pathname == jobs.__file__


@each_caller
def test_a_failing_calls_records_arrive_before_its_error(
    caller: Caller, collected: Collector
) -> None:
    with forwarding() as manager, pytest.raises(ValueError, match="outer"):
        caller(manager, jobs.log_and_raise)
    (record,) = collected.records
    assert record.getMessage() == "it failed"
    assert record.exc_text is not None
    assert "in log_and_raise" in record.exc_text
    assert record.exc_text.endswith("KeyError: 'inner'")


def test_records_are_handled_in_the_context_of_the_awaiting_caller(
    loop_runner: LoopRunner, collected: Collector
) -> None:
    async def one(manager: LeasedExecutorManager, name: str) -> None:
        jobs.request_id.set(name)
        await manager.run(jobs.log, *([name] * 20))

    async def both(manager: LeasedExecutorManager) -> None:
        await asyncio.gather(*(one(manager, f"request {number}") for number in range(6)))

    with forwarding(2) as manager:
        loop_runner(both(manager))
    assert len(collected.seen) == 6 * 20
    assert [record.getMessage() for record, _ in collected.seen] == [
        request for _, request in collected.seen
    ]


def test_records_are_handled_in_the_context_of_the_blocking_caller(collected: Collector) -> None:
    def one(name: str) -> None:
        jobs.request_id.set(name)
        manager.run_sync(jobs.log, name)

    with forwarding(2) as manager, ThreadPoolExecutor(2) as threads:
        names = [f"request {number}" for number in range(6)]
        for future in [threads.submit(copy_context().run, one, name) for name in names]:
            future.result()
    assert sorted(request for _, request in collected.seen) == names
    assert collected.texts == [request for _, request in collected.seen]


def test_what_a_handler_sets_in_the_context_does_not_reach_the_caller() -> None:
    class Setting(Collector):
        def emit(self, record: logging.LogRecord) -> None:
            super().emit(record)
            jobs.request_id.set("the handler's")

    handler = Setting()
    logging.getLogger("tests.worker").addHandler(handler)
    try:
        with forwarding() as manager:
            manager.run_sync(jobs.log, "text", level=logging.WARNING)
    finally:
        logging.getLogger("tests.worker").removeHandler(handler)
    assert len(handler.seen) == 1
    assert jobs.request_id.get() == "none"


@pytest.mark.parametrize(
    ("caller", "count"),
    # Once is enough for the number that the contract names: it takes seconds.
    [(caller, 100_000 if caller.name == "asyncio" else 10_000) for caller in CALLERS],
    ids=[caller.name for caller in CALLERS],
)
def test_a_hundred_thousand_records_arrive_complete_and_in_order(
    caller: Caller, count: int, collected: Collector
) -> None:
    with forwarding() as manager:
        assert caller(manager, jobs.log_many, count) == count
    assert collected.texts == [f"record {number}" for number in range(count)]


@each_caller
def test_a_record_may_be_larger_than_what_is_received_at_once(
    caller: Caller, collected: Collector
) -> None:
    text = "long " * 100_000
    with forwarding() as manager:
        caller(manager, jobs.log, "before", text, "after")
    assert collected.texts == ["before", text, "after"]


@each_caller
def test_a_record_logged_by_a_signal_handler_does_not_tear_another_one(
    caller: Caller, collected: Collector
) -> None:
    with forwarding() as manager:
        ticks = caller(manager, jobs.log_from_signal_handler, 30, 300_000)
        # What interrupted the very last frame arrives with the next call.
        caller(manager, jobs.log, "the end")
    texts = [text for text in collected.texts if text != "tick"]
    assert texts == [f"{number:x}" * 300_000 for number in range(10)] * 3 + ["the end"]
    assert collected.texts.count("tick") == ticks > 0


# --- start-up --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_the_initializers_records_arrive_too(method: str, collected: Collector) -> None:
    """So the log set-up comes first."""
    long = "long " * 50_000
    with forwarding(
        initializer=jobs.initialize_and_log, initargs=[long], mp_context=method
    ) as manager:
        wait_until(lambda: collected.records)
        assert manager.run_sync(jobs.log, "after") == collected.records[0].process
    assert [(record.name, record.getMessage()) for record in collected.records] == [
        ("tests.initializer", long),
        ("tests.worker", "after"),
    ]


NOISY = """
import logging
logging.basicConfig()
own = logging.getLogger("tests.own")
own.propagate = False
own.addHandler(logging.StreamHandler())
"""


@pytest.mark.parametrize("clear", [True, False])
def test_handlers_configured_in_the_worker_are_removed_unless_asked_for(
    *, clear: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collected: Collector
) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.syspath_prepend(str(tmp_path))
    with forwarding(preload=["noisy"], clear_process_log_handlers=clear) as manager:
        kept = [] if clear else ["StreamHandler"]
        assert manager.run_sync(jobs.handlers) == [*kept, "ForwardHandler"]
        assert manager.run_sync(jobs.handlers, "tests.own") == [*kept, "ForwardHandler"]
        manager.run_sync(jobs.log, "once", logger="tests.own")
    assert collected.texts == ["once"]


FORK_SERVER = """
import logging, sys
from leasepool_django.backends.process.records import forward_logs
if sys.argv[1] != "none":
    logging.basicConfig(format="%(message)s")
forward_logs(logging.INFO, clear=sys.argv[1] == "clear", manager="leasepool")
logging.getLogger("preload").info("nothing")
logging.getLogger("preload").warning("once")
"""


@pytest.mark.parametrize("handlers", ["clear", "keep", "none"])
def test_what_a_thread_of_the_fork_server_logs_is_shown_once(handlers: str) -> None:
    """There is no worker yet whose connection it could take."""
    done = subprocess.run(
        [sys.executable, "-c", FORK_SERVER, handlers],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    shown = ["nothing", "once"] if handlers == "keep" else ["once"]
    assert done.stderr.splitlines() == shown


# --- configuration ---------------------------------------------------------------------------


def test_nothing_is_forwarded_unless_asked_for(collected: Collector) -> None:
    with running() as manager:
        assert manager.run_sync(jobs.handlers) == []
        manager.run_sync(jobs.log, "stays there")
    assert collected.records == []


def test_only_records_of_the_level_or_above_are_forwarded(collected: Collector) -> None:
    with forwarding(process_log_level="WARNING") as manager:
        manager.run_sync(jobs.log, "info")
        manager.run_sync(jobs.log, "warning", level=logging.WARNING)
    assert collected.texts == ["warning"]


@pytest.mark.parametrize("as_logger", [True, False], ids=["logger", "name"])
def test_one_logger_can_be_named_for_all_records(*, as_logger: bool, collected: Collector) -> None:
    target = logging.getLogger("elsewhere")
    with (
        collecting("elsewhere") as elsewhere,
        forwarding(process_log_target_logger=target if as_logger else target.name) as manager,
    ):
        manager.run_sync(jobs.log, "text")
    assert elsewhere.texts == ["text"]
    assert elsewhere.records[0].name == "tests.worker"
    assert collected.records == []


def test_the_levels_of_this_process_hold_as_well(collected: Collector) -> None:
    logging.getLogger("tests.worker").setLevel(logging.ERROR)
    try:
        with forwarding() as manager:
            manager.run_sync(jobs.log, "too low")
    finally:
        logging.getLogger("tests.worker").setLevel(logging.NOTSET)
    assert collected.records == []


# --- trouble ---------------------------------------------------------------------------------


def test_extras_arrive_as_they_are_or_as_text(collected: Collector) -> None:
    with forwarding() as manager:
        manager.run_sync(jobs.log_with_extras)
    (record,) = collected.records
    assert record.getMessage() == "with <Unpicklable>"
    extras = record.__dict__
    assert extras["number"] == 7
    assert extras["pair"] == (1, 2)
    assert extras["lock"].startswith("<unlocked _thread.lock object")


@each_caller
def test_a_filter_that_raises_costs_the_record_and_nothing_else(
    caller: Caller, collected: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(record: logging.LogRecord) -> bool:
        if record.getMessage() == "bad":
            raise ZeroDivisionError("in a filter")
        return True

    collected.addFilter(failing)
    with forwarding() as manager:
        caller(manager, jobs.log, "good", "bad", "good again")
        wait_until(lambda: "a log record of a worker could not be handled" in caplog.text)
    assert collected.texts == ["good", "good again"]
    assert "ZeroDivisionError: in a filter" in caplog.text


def test_a_thread_left_behind_logs_without_a_context(
    loop_runner: LoopRunner, collected: Collector, tmp_path: Path
) -> None:
    async def leave_thread() -> None:
        jobs.request_id.set("over")
        await manager.run(jobs.log_from_thread_later, tmp_path / "now")
        (tmp_path / "now").touch()
        await async_wait_until(lambda: collected.records)

    with forwarding() as manager:
        loop_runner(leave_thread())
    ((record, request),) = collected.seen
    assert record.getMessage() == "from a thread left behind"
    assert record.threadName == "left-behind"
    assert request == "none"


def test_a_child_of_a_worker_has_no_line_to_this_process(
    collected: Collector, tmp_path: Path
) -> None:
    with forwarding() as manager:
        manager.run_sync(jobs.fork_and_log, tmp_path / "logged")
        manager.run_sync(jobs.log, "the worker itself")
    assert (tmp_path / "logged").exists()
    assert collected.texts == ["the worker itself"]


def test_a_worker_that_dies_has_its_records_handled(collected: Collector) -> None:
    with forwarding() as manager, pytest.raises(WorkerCrashedError):
        manager.run_sync(jobs.log_and_die, "last words")
    assert collected.texts == ["last words"]
