"""Django signals: what is sent, to whom, and on which thread."""

from __future__ import annotations

import copy
import os
import pickle
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.dispatch import Signal

from leasepool_django import CallTimeoutError, WorkerCrashedError, signals
from leasepool_django.engine import Event, LeasedExecutorManager, ManagerStats
from leasepool_django.handler import pools

from . import process_jobs as jobs
from .pages import ROOT, tables
from .process_pools import new_manager
from .waiting import wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


@pytest.fixture
def running(settings: Settings) -> Iterator[None]:
    """Run one process pool of one worker."""
    settings.LEASEPOOL = {"default": {"WORKERS_PER_POOL": 1, "SHUTDOWN_GRACE_SECONDS": 0}}
    yield
    pools.reset()


class Heard:
    """A receiver that notes what it gets; connect it with ``hear``."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Event, str]] = []

    def __call__(self, *, alias: str, event: Event, **_: Any) -> None:
        self.events.append((alias, event, threading.current_thread().name))

    def kinds(self) -> list[str]:
        """The kinds of the events so far."""
        return [event.kind for _, event, _ in self.events]


@pytest.fixture
def hear() -> Iterator[Any]:
    """Connect a ``Heard`` to signals, and disconnect it in the end."""
    heard = Heard()
    connected: list[Signal] = []

    def connect(*wanted: Signal) -> Heard:
        for signal in wanted:
            signal.connect(heard)
            connected.append(signal)
        return heard

    yield connect
    for signal in connected:
        signal.disconnect(heard)


def test_a_lease_is_told_from_beginning_to_end(running: None, hear: Any) -> None:
    """With its alias, id and owner, on the manager's own thread."""
    heard = hear(signals.lease_acquired, signals.lease_released)
    with pools["default"].lease_sync(owner="invoice 7") as lease:
        lease_id = lease.lease_id
    wait_until(lambda: len(heard.events) == 2, message="no two events")
    assert heard.kinds() == ["lease_acquired", "lease_released"]
    alias, event, thread = heard.events[0]
    assert alias == "default"
    assert event.facts == {"lease_id": lease_id, "owner": "invoice 7", "workers": 1}
    assert thread == "leasepool-default-notifier"


def test_workers_that_start_and_crash_are_told(running: None, hear: Any) -> None:
    """Each with its pid."""
    heard = hear(signals.worker_started, signals.worker_crashed)

    with pytest.raises(WorkerCrashedError):
        pools["default"].run_sync(os.abort)
    wait_until(lambda: len(heard.events) == 3, message="no three events")
    assert heard.kinds() == ["worker_started", "worker_crashed", "worker_started"]
    started, crashed = heard.events[0][1], heard.events[1][1]
    pid = started.facts["pid"]
    assert crashed.facts == {"pid": pid, "calls": 1, "exitcode": None, "signal_name": "SIGABRT"}
    assert crashed.text == f"worker {pid} crashed after 1 call(s): it was killed by SIGABRT"


def test_a_receiver_that_raises_disturbs_nobody(
    running: None, hear: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the next receiver and the next event come as ever."""

    def broken(**_: Any) -> None:
        raise ZeroDivisionError

    signals.lease_acquired.connect(broken)
    try:
        heard = hear(signals.lease_acquired)
        for _ in range(2):
            with pools["default"].lease_sync():
                pass
        wait_until(lambda: len(heard.events) == 2, message="no two events")
    finally:
        signals.lease_acquired.disconnect(broken)
    assert "ZeroDivisionError" in caplog.text


def test_what_nobody_listens_to_is_not_wanted(hear: Any) -> None:
    """Lease events cost nothing without receivers."""
    assert not signals.wanted("lease_acquired")
    hear(signals.lease_acquired)
    assert signals.wanted("lease_acquired")
    assert not signals.wanted("no_such_kind")


def test_the_page_says_what_is_told(tmp_path: Path) -> None:
    """The tables of docs/deployment.md: each signal with its facts, and the snapshot."""
    documented: dict[str, set[str]] = {}
    attributes: set[str] = set()
    for row in (row for rows in tables(ROOT / "docs" / "deployment.md") for row in rows):
        if "signal" in row:
            facts = row["`event.facts`"]
            documented[row["signal"].strip("`")] = set(re.findall(r"`(\w+)`", facts))
        attributes.update(re.findall(r"`(\w+)`", row.get("attribute", "")))
    assert attributes
    assert attributes <= {field.name for field in fields(ManagerStats)}

    events: list[Event] = []

    def wait_for(kind: str) -> None:
        wait_until(lambda: any(event.kind == kind for event in events))

    obstacle = tmp_path / "obstacle"
    manager = new_manager(
        initializer=jobs.initialize_until, initargs=[obstacle], lease_grace_seconds=1
    )
    manager.subscribe(events.append)
    manager.start_sync()
    with manager.lease_sync():
        pass
    with manager.lease_sync(lease_seconds=0.01):
        wait_for("lease_expired")
    with pytest.raises(CallTimeoutError):
        manager.options(call_timeout=0.01).run_sync(time.sleep, 60)
    wait_until(lambda: manager.stats().idle_workers)
    obstacle.touch()
    with pytest.raises(WorkerCrashedError):
        manager.run_sync(jobs.kill_own_process)
    wait_for("worker_start_failed")
    obstacle.unlink()
    manager.options(timeout=20).run_sync(jobs.echo, 1)
    manager.stop_sync()
    seen = {event.kind: set(event.facts) for event in events}
    assert seen == documented
    assert set(documented) == set(signals.__all__) - {"send", "wanted"}


def test_every_signal_belongs_to_an_event_of_the_engine() -> None:
    """And is passed on by its kind; kinds without a signal are left alone."""
    for name in signals.__all__:
        signal = getattr(signals, name)
        if isinstance(signal, Signal):
            heard = Heard()
            signal.connect(heard)
            try:
                signals.send(LeasedExecutorManager, "x", Event(name, "m", "text"))
            finally:
                signal.disconnect(heard)
            assert heard.kinds() == [name]
    signals.send(LeasedExecutorManager, "x", Event("fork_server_lost", "m", "text"))


def test_an_event_can_be_sent_on_and_written() -> None:
    event = Event("fork_server_lost", "m", "text")
    assert pickle.loads(pickle.dumps(event)) == copy.deepcopy(event) == event
    assert "fork_server_lost" in "%s" % event  # noqa: UP031 - as logging does
