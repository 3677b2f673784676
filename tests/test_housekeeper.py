"""The housekeeper's thread: jobs, descriptors, timers and deadlines, and that nothing ends it."""

from __future__ import annotations

import gc
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from leasepool_django.engine import housekeeper as housekeeper_module
from leasepool_django.engine.housekeeper import Housekeeper
from tests.waiting import wait_until

NEVER = 3600.0


class Ticks:
    """Counts how often the housekeeper looks, and tells it when to look again."""

    def __init__(self) -> None:
        self.count = 0
        self.deadline = math.inf

    def __call__(self, now: float) -> float:
        self.count += 1
        if self.deadline <= now:
            self.deadline = math.inf
        return self.deadline


@contextmanager
def keeping(tick: Callable[[float], float]) -> Iterator[Housekeeper]:
    keeper = Housekeeper("test", logging.getLogger("tests.housekeeper"), tick)
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.post(lambda: keeper.stop(lambda: None))
        wait_until(lambda: not is_alive())


def is_alive() -> bool:
    return any(thread.name == "test-housekeeper" for thread in threading.enumerate())


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """Nothing wakes the housekeeper but what a test does."""
    monkeypatch.setattr(housekeeper_module, "TICK", NEVER)
    return Ticks()


@pytest.fixture
def keeper(ticks: Ticks) -> Iterator[Housekeeper]:
    with keeping(ticks) as keeper:
        yield keeper


def on_thread(keeper: Housekeeper, job: Callable[[], object]) -> None:
    """Run ``job`` on the housekeeper's thread, and wait for it."""
    done = threading.Event()

    def run() -> None:
        try:
            job()
        finally:
            done.set()

    keeper.post(run)
    assert done.wait(10)


def test_jobs_run_in_order_on_its_thread(keeper: Housekeeper) -> None:
    done: list[tuple[int, str]] = []

    def note(number: int) -> None:
        done.append((number, threading.current_thread().name))

    for number in range(100):
        keeper.post(partial(note, number))
    wait_until(lambda: len(done) == 100)
    assert done == [(number, "test-housekeeper") for number in range(100)]


def test_a_job_may_post_another(keeper: Housekeeper) -> None:
    done = threading.Event()
    keeper.post(lambda: keeper.post(done.set))
    assert done.wait(10)


def test_what_fails_is_logged_and_the_thread_goes_on(
    keeper: Housekeeper, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a defect")

    keeper.post(fail)
    on_thread(keeper, lambda: keeper.call_later(0, fail))
    wait_until(lambda: len(caplog.records) == 2)
    assert {record.name for record in caplog.records} == {"tests.housekeeper"}
    raised = [record.exc_info[0] if record.exc_info else None for record in caplog.records]
    assert raised == [ZeroDivisionError, ZeroDivisionError]
    on_thread(keeper, lambda: None)


def test_a_look_that_fails_is_logged_and_neither_repeated_at_once_nor_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(housekeeper_module, "TICK", 0.02)

    def fail(now: float) -> float:
        if len(looks) < 3:
            looks.append(now)
            raise ZeroDivisionError("a defect")
        return math.inf

    looks: list[float] = []
    with keeping(fail) as keeper:
        on_thread(keeper, lambda: None)
        wait_until(lambda: len(looks) == 3)
        assert looks[2] - looks[0] >= 0.02
    assert len(caplog.records) == 3


# --- deadlines and timers -------------------------------------------------------------------------


def test_it_looks_again_after_a_tick_at_the_latest(
    ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeper_module, "TICK", 0.01)
    with keeping(ticks):
        wait_until(lambda: ticks.count > 5)


def test_it_looks_again_at_the_deadline_that_it_found(ticks: Ticks) -> None:
    ticks.deadline = time.monotonic() + 0.05
    with keeping(ticks):
        wait_until(lambda: ticks.deadline == math.inf)


def test_it_is_woken_for_an_earlier_deadline_only(ticks: Ticks) -> None:
    ticks.deadline = far = time.monotonic() + NEVER / 2
    with keeping(ticks) as keeper:
        wait_until(lambda: keeper.next_wake == far)
        before = ticks.count
        keeper.wake_by(far + 1)
        on_thread(keeper, lambda: None)
        wait_until(lambda: keeper.next_wake == far)
        assert ticks.count == before + 1  # for the job, not for the deadline
        ticks.deadline = time.monotonic() + 0.02
        keeper.wake_by(ticks.deadline)
        wait_until(lambda: ticks.deadline == math.inf)


def test_timers_run_in_the_order_of_their_times(keeper: Housekeeper) -> None:
    order: list[int] = []

    def set_timers() -> None:
        for number, delay in enumerate([0.06, 0.02, 0.04, 0.02]):
            keeper.call_later(delay, partial(order.append, number))

    on_thread(keeper, set_timers)
    wait_until(lambda: len(order) == 4)
    assert order == [1, 3, 2, 0]


def test_a_cancelled_timer_does_not_run(keeper: Housekeeper) -> None:
    """Neither one that is next, nor one whose time has come in the same round."""
    order: list[str] = []

    def set_timers() -> None:
        keeper.call_later(0.01, lambda: order.append("cancelled")).cancel()
        second = keeper.call_later(0.03, lambda: order.append("cancelled by the first"))
        keeper.call_later(0.02, lambda: order.append("first"))
        keeper.call_later(0.02, second.cancel)
        keeper.call_later(0.02, lambda: time.sleep(0.02))
        keeper.call_later(0.04, lambda: order.append("last"))

    on_thread(keeper, set_timers)
    wait_until(lambda: "last" in order)
    assert order == ["first", "last"]


# --- descriptors ----------------------------------------------------------------------------------


def test_a_descriptor_is_watched_until_it_is_no_more(keeper: Housekeeper) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        received: list[bytes] = []
        on_thread(
            keeper, lambda: keeper.watch(ours.fileno(), lambda: received.append(ours.recv(9)))
        )
        theirs.send(b"one")
        wait_until(lambda: received == [b"one"])
        theirs.send(b"two")
        wait_until(lambda: received == [b"one", b"two"])
        on_thread(keeper, lambda: keeper.unwatch(ours.fileno()))
        on_thread(keeper, lambda: keeper.unwatch(ours.fileno()))
        theirs.send(b"three")
        on_thread(keeper, lambda: None)
        assert received == [b"one", b"two"]


def test_a_descriptor_that_is_given_up_in_the_same_round_is_not_touched(
    keeper: Housekeeper,
) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def ready(number: int) -> None:
        called.append(number)
        for ours, _ in pairs:
            keeper.unwatch(ours.fileno())

    def watch() -> None:
        for number, (ours, theirs) in enumerate(pairs):
            theirs.send(b"both")
            keeper.watch(ours.fileno(), partial(ready, number))

    on_thread(keeper, watch)
    on_thread(keeper, lambda: None)
    assert len(called) == 1
    for ends in pairs:
        for end in ends:
            end.close()


# --- waking ---------------------------------------------------------------------------------------


def test_it_may_be_woken_any_number_of_times_while_it_is_busy(keeper: Housekeeper) -> None:
    busy, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def be_busy() -> None:
        busy.set()
        go_on.wait(10)

    keeper.post(be_busy)
    assert busy.wait(10)
    for _ in range(50_000):
        keeper.wake()
    keeper.post(done.set)
    go_on.set()
    assert done.wait(10)


def test_a_finalizer_may_post_at_any_moment(keeper: Housekeeper) -> None:
    class Posting:
        def __init__(self) -> None:
            self.myself = self

        def __del__(self) -> None:
            keeper.post(lambda: collected.append(1))

    collected: list[int] = []
    thresholds = gc.get_threshold()
    gc.set_threshold(2, 1, 1)
    try:
        for _ in range(300):
            Posting()
            keeper.post(lambda: None)
    finally:
        gc.set_threshold(*thresholds)

    def all_collected() -> bool:
        gc.collect()  # does nothing while another thread is at it
        return len(collected) == 300

    wait_until(all_collected)


def test_after_its_end_it_may_be_woken_in_vain(ticks: Ticks) -> None:
    with keeping(ticks) as keeper:
        on_thread(keeper, lambda: None)
    keeper.wake()
    keeper.wake_by(0)
    keeper.post(lambda: None)
    assert not is_alive()


def test_it_tells_when_somebody_has_closed_its_descriptors(ticks: Ticks) -> None:
    with keeping(ticks) as keeper:
        sender = keeper._wake_sender
        number = os.dup(sender.fileno())
        sender.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            keeper.wake()
        keeper._wake_sender = socket.socket(fileno=number)


def test_one_that_was_never_started_can_be_discarded(ticks: Ticks) -> None:
    keeper = Housekeeper("test", logging.getLogger("tests.housekeeper"), ticks)
    keeper.discard()
    keeper.wake()
