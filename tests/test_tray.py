"""Where small calls lie until their worker takes them."""

from __future__ import annotations

import asyncio

import pytest

from leasepool_django.backends.process import tray
from leasepool_django.backends.process.tray import LARGEST, Tray
from tests import process_jobs as jobs
from tests.process_pools import running

pytestmark = pytest.mark.skipif(not tray.SUPPORTED, reason="there is none here")


@pytest.fixture
def made() -> Tray:
    made = Tray.create()
    assert made is not None
    return made


def test_what_is_taken_back_leaves_its_number_to_the_next(made: Tray) -> None:
    """As often as it is done: an interruption may come before anybody has noted it."""
    made.put(b"one")
    made.put(b"two")
    taken: list[bytes] = []
    for _ in range(3):
        made.take_back(b"two", taken)
        assert (taken, made.next) == ([b"two"], 1)
    made.put(b"three")
    assert made.next == 2
    assert made.never_seen(0, b"one", dead=False)
    assert made.never_seen(1, b"three", dead=False)
    assert not made.never_seen(1, b"three", dead=False)
    made.close()


def test_one_that_is_closed_takes_nothing_and_has_nothing(made: Tray) -> None:
    made.put(b"one")
    made.close()
    assert not made.never_seen(0, b"one", dead=False)
    assert made.never_seen(0, b"one", dead=True)
    with pytest.raises(OSError, match="No buffer space"):
        made.put(b"two")
    made.close()


def test_more_calls_than_the_counter_counts_keep_their_order() -> None:
    async def calls() -> None:
        for size in range(LARGEST - 300, LARGEST + 300):
            assert await manager.run(len, bytes(size)) == size

    with running() as manager:
        asyncio.run(calls())
        asyncio.run(calls())


def test_no_function_can_cut_off_the_memory_that_the_server_reads() -> None:
    """It would die of a signal."""
    with running() as manager:
        assert manager.run_sync(jobs.shrink_tray) == ["PermissionError"]


def test_a_process_that_a_function_forks_has_nothing_of_it() -> None:
    with running() as manager:
        found = manager.run_sync(jobs.descriptors_of_a_fork)
        assert not [target for target in found if "worker-tray" in target]
        assert not [target for target in found if target.startswith("socket:")]
        assert manager.run_sync(jobs.echo, 1) == 1
