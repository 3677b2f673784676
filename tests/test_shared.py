"""Large payloads through shared memory: right, safe, and gone afterwards."""

from __future__ import annotations

import array
import asyncio
import gc
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leasepool_django import NotPicklableError
from leasepool_django.backends.process import driver, shared
from leasepool_django.backends.process.shared import THRESHOLD, Payload, Segment, dump, load_parts
from leasepool_django.engine import LeasedExecutorManager

from . import shared_jobs as jobs
from .waiting import wait_until

pytestmark = pytest.mark.skipif(not shared.AVAILABLE, reason="needs memfd_create (Linux)")

SIZES = [0, 10, THRESHOLD - 100, THRESHOLD, THRESHOLD + 1, 1_000_000, 5_000_000]


@contextmanager
def manager(**options: Any) -> Iterator[LeasedExecutorManager]:
    """Run a manager of one worker."""
    managed = LeasedExecutorManager(max_pools=1, workers_per_pool=1, **options)
    managed.start_sync()
    try:
        yield managed
    finally:
        managed.stop_sync(grace=0)


@pytest.fixture(scope="module", autouse=True)
def numpy_is_warm() -> None:
    """Let NumPy open what it opens at its first use before leaks are looked for."""
    np.ones(10).sum()


def mappings() -> int:
    """Count this process's mappings of segments, once nothing waits for the collector."""
    gc.collect()
    return jobs.shared_memory_in_use()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "make",
    [
        os.urandom,
        lambda size: bytearray(os.urandom(size)),
        lambda size: "ü" * size,
        lambda size: array.array("d", [1.5]) * (size // 8),
        lambda size: {"a": [os.urandom(size)], "b": (bytearray(size), "x" * size), "c": size},
    ],
    ids=["bytes", "bytearray", "str", "array", "nested"],
)
def test_values_of_every_size_come_back_equal_and_of_their_type(
    make: Callable[[int], Any], size: int
) -> None:
    """Below and above the threshold, and exactly at it."""
    value = make(size)
    with manager() as managed:
        for _ in range(2):  # the second time in a segment that was used before
            back = managed.run_sync(jobs.echo, value)
            assert type(back) is type(value)
            assert back == value
            assert managed.run_sync(jobs.echo, value=value) == value


@pytest.mark.parametrize("length", [1, 100, 10_000, 1_000_000])
def test_arrays_arrive_writable_and_aligned(length: int) -> None:
    """A function may use an array as its own."""
    with manager() as managed:
        values = np.arange(length, dtype=np.float64)
        back = managed.run_sync(jobs.echo, values)
        assert (back == values).all()
        back[:] = 7.0  # this process's own
        assert managed.run_sync(jobs.is_aligned, values)
        assert managed.run_sync(jobs.overwrite, values) == -length
        assert values[-1] == length - 1
        assert (managed.run_sync(jobs.echo, values[::2]) == values[::2]).all()
        fortran = np.asfortranarray(values.reshape(1, -1))
        assert (managed.run_sync(jobs.echo, fortran) == fortran).all()
        assert managed.run_sync(jobs.echo, {"deep": [values, values]})["deep"][1].sum() == (
            values.sum()
        )


@pytest.mark.parametrize("size", [3, 300_000])
def test_memoryviews_travel_both_ways(size: int) -> None:
    """Pickle alone refuses them."""
    with manager() as managed:
        data = bytes(size)
        name, length, shape, form = managed.run_sync(jobs.describe, memoryview(data))
        assert (name, length, shape, form) == ("memoryview", size, (size,), "B")
        view = managed.run_sync(jobs.view_of, data)
        assert type(view) is memoryview
        assert view == data
        doubles = memoryview(array.array("d", [1.0, 2.0, 3.0]))
        assert managed.run_sync(jobs.describe, doubles)[2:] == ((3,), "d")
        for shape in [(0,), (0, 3)]:
            empty = np.zeros(shape).data
            got = managed.run_sync(jobs.echo, empty)
            assert (got.format, got.shape, got.tolist()) == ("d", shape, [])
        fortran = np.asfortranarray(np.arange(2 * size).reshape(2, size)).data
        assert managed.run_sync(jobs.as_list, fortran) == fortran.tolist()
        assert managed.run_sync(jobs.echo, fortran).tolist() == fortran.tolist()


@pytest.mark.parametrize(
    "values", [np.zeros(3, ">i4"), np.zeros(30_000, complex), np.zeros((2, 0, 3))]
)
def test_memoryviews_that_cannot_be_made_again_are_refused(values: Any) -> None:
    with manager() as managed:
        with pytest.raises(NotPicklableError, match=r"args\[0\]: memoryview.*tobytes") as refused:
            managed.run_sync(jobs.describe, values.data)
        assert refused.value.path == "args[0]"
        with pytest.raises(NotPicklableError, match=r"result: memoryview.*tobytes"):
            managed.run_sync(jobs.memory_of, values)


def test_what_a_function_keeps_never_changes() -> None:
    """A segment that a function still refers to is not written again."""
    with manager() as managed:
        sums = [
            managed.run_sync(jobs.keep, np.full(100_000, float(value))) for value in range(1, 6)
        ]
        assert sums == [100_000.0 * value for value in range(1, 6)]
        assert managed.run_sync(jobs.sums_of_kept) == sums


def test_what_a_caller_keeps_never_changes() -> None:
    """Nor is one that a result in this process refers to, even when the worker is gone."""
    with manager() as managed:
        results = [managed.run_sync(jobs.fill, 100_000, float(value)) for value in range(5)]
        part = managed.run_sync(jobs.fill, 100_000, 9.0)[5:10]
        for _ in range(5):
            managed.run_sync(jobs.fill, 100_000, -1.0)
    assert [result.sum() for result in results] == [100_000.0 * value for value in range(5)]
    assert part.tolist() == [9.0] * 5
    results.clear()
    del part
    wait_until(lambda: mappings() == 0, message="a segment is still mapped")


def test_a_segment_is_used_again_when_nothing_refers_to_it() -> None:
    """Page faults are paid once: the worker has one segment for each direction."""
    with manager() as managed:
        for _ in range(10):
            managed.run_sync(jobs.echo, np.ones(100_000))
        assert managed.run_sync(jobs.shared_memory_in_use) == 2
        assert mappings() == 2


def test_async_callers_share_memory_as_well() -> None:
    """The loop's driver and the blocking one move the same frames."""

    async def many(managed: LeasedExecutorManager) -> list[Any]:
        await managed.start()
        try:
            arrays = [np.full(50_000, float(value)) for value in range(20)]
            return await asyncio.gather(*(managed.run(jobs.echo, item) for item in arrays))
        finally:
            await managed.stop()

    back = asyncio.run(many(LeasedExecutorManager(max_pools=1, workers_per_pool=2)))
    assert [item[0] for item in back] == list(range(20))


def test_without_memory_for_an_argument_the_socket_carries_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full memory is an error that is dealt with, not a signal."""
    with manager() as managed:
        values = np.arange(100_000, dtype=np.float64)
        monkeypatch.setattr(os, "pwrite", jobs.no_memory_left)
        assert (managed.run_sync(jobs.echo, values) == values).all()
        monkeypatch.setattr(os, "posix_fallocate", jobs.no_memory_left)
        assert (asyncio.run(managed.run(jobs.echo, values)) == values).all()
        monkeypatch.undo()
        assert (managed.run_sync(jobs.echo, values) == values).all()


def test_without_memory_for_a_result_the_socket_carries_it() -> None:
    """The same on the worker's side."""
    with manager(initializer=jobs.use_up_memory) as managed:
        for _ in range(3):
            assert managed.run_sync(jobs.fill, 100_000, 2.0).sum() == 200_000.0


def test_without_a_descriptor_for_a_segment_the_socket_carries_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No segment can be made: results too."""
    with manager() as managed:
        monkeypatch.setattr(os, "memfd_create", jobs.no_memory_left)
        values = np.arange(100_000, dtype=np.float64)
        assert (managed.run_sync(jobs.echo, values) == values).all()
        assert mappings() == 0


def test_a_forked_child_sees_no_argument_of_a_later_call(tmp_path: Path) -> None:
    """Nor can it change one: both segments are given up with the call that has forked."""
    with manager() as managed:
        managed.run_sync(jobs.fork_watcher, np.full(200_000, 1, np.uint8), tmp_path)
        later = np.full(200_000, 2, np.uint8)
        assert (managed.run_sync(jobs.echo, later) == later).all()
        (tmp_path / "go").touch()
        wait_until((tmp_path / "told").exists, timeout=20)
        assert (tmp_path / "told").read_text() == "1"
        wait_until((tmp_path / "written").exists, timeout=20)
        assert (managed.run_sync(jobs.echo, later) == later).all()


def test_a_result_is_in_no_memory_that_a_forked_child_has() -> None:
    with manager() as managed:
        managed.run_sync(jobs.fill, 100_000, 1.0)
        seen = managed.run_sync(jobs.fork_and_fill, 100_000, 2.0)[1]
        assert len(seen) == 1
        (now,) = managed.run_sync(jobs.segments)
        assert now not in seen
        # What is not seen by anybody is used again.
        managed.run_sync(jobs.fill, 100_000, 3.0)
        assert managed.run_sync(jobs.segments) == {now}
        assert managed.run_sync(jobs.fork_and_fill, 1, 4.0)[1] == {now}
        assert managed.run_sync(jobs.segments) == set()


SMALL, LARGE = bytes(100_000), bytes(40_000_000)


@pytest.mark.parametrize(
    ("shorten", "amount"), [(jobs.descriptors_left, 0), (jobs.memory_left, 20_000_000)]
)
def test_an_argument_that_a_worker_cannot_map_is_an_error_while_that_is_so(
    shorten: Callable[[int | None], int], amount: int
) -> None:
    """The worker lives on, and closes nothing that is not its own."""
    with manager() as managed:
        if amount:  # else a segment that was too small would leave its descriptors to the next
            assert managed.run_sync(jobs.echo, SMALL) == SMALL
        pid = managed.run_sync(shorten, amount)
        for _ in range(2):
            with pytest.raises(OSError, match="no memory was free for the argument's shared"):
                managed.run_sync(jobs.echo, LARGE)
        assert managed.run_sync(shorten, None) == pid
        opened = managed.run_sync(jobs.open_files, 5)
        for value in (LARGE, SMALL, LARGE):
            assert managed.run_sync(len, value) == len(value)
        assert managed.run_sync(jobs.echo, SMALL) == SMALL
        assert managed.run_sync(jobs.are_open, opened)
        assert managed.run_sync(jobs.shared_memory_in_use) == 2
        assert managed.run_sync(os.getpid) == pid


def test_a_larger_argument_takes_over_the_descriptors_of_the_one_before() -> None:
    with manager() as managed:
        assert managed.run_sync(len, SMALL) == len(SMALL)
        managed.run_sync(jobs.descriptors_left, 0)
        assert managed.run_sync(len, LARGE) == len(LARGE)
        assert managed.run_sync(jobs.descriptors_left, None) == managed.run_sync(os.getpid)


def test_a_result_that_a_worker_cannot_map_goes_over_the_socket() -> None:
    """Also when a descriptor for it came."""
    with manager() as managed:
        managed.run_sync(jobs.keep_bytes, len(LARGE))
        pid = managed.run_sync(jobs.memory_left, 20_000_000)
        for _ in range(2):
            assert managed.run_sync(jobs.last_kept) == LARGE
        assert managed.run_sync(jobs.memory_left, None) == pid
        assert managed.run_sync(jobs.last_kept) == LARGE
        assert managed.run_sync(jobs.shared_memory_in_use) == 1
        assert managed.run_sync(jobs.descriptors_left, 3) == pid
        assert len(managed.run_sync(jobs.open_files, 3)) == 3  # nothing was left open


def test_a_segment_is_closed_once() -> None:
    """Its number may be another file's by then."""
    segment = Segment.create(100_000)
    number = segment.fd
    segment.close()
    reader, writer = os.pipe()
    try:
        assert number in (reader, writer)
        segment.close()
        assert os.write(writer, b"x") == 1
        assert os.read(reader, 1) == b"x"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_segment_is_sealed_against_shrinking() -> None:
    """Else the other side would die of a signal when it reads."""
    segment = Segment.create(100_000)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, 10)
    finally:
        segment.close()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "with small calls"])
@pytest.mark.parametrize("blocking", [False, True], ids=["asyncio", "blocking"])
def test_memory_that_is_not_used_any_more_is_given_back(
    busy: bool,  # noqa: FBT001
    blocking: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By workers that stay idle and by those that have small calls only; large ones go on."""
    monkeypatch.setattr(driver, "KEEP_SECONDS", 0.5)
    values = np.ones(100_000)

    async def calls(managed: LeasedExecutorManager) -> None:
        for _ in range(2):
            assert (await managed.run(jobs.echo, values)).sum() == 100_000
            async with asyncio.timeout(20):
                while mappings():
                    if busy:
                        await managed.run(os.getpid)
                    await asyncio.sleep(0.001)
        assert await managed.run(jobs.shared_memory_in_use) == 0

    def blocking_calls(managed: LeasedExecutorManager) -> None:
        for _ in range(2):
            assert managed.run_sync(jobs.echo, values).sum() == 100_000
            wait_until(lambda: not (busy and managed.run_sync(jobs.echo, 0)) and not mappings())
        assert managed.run_sync(jobs.shared_memory_in_use) == 0

    with manager() as managed:
        if blocking:
            blocking_calls(managed)
        else:
            asyncio.run(calls(managed))


def test_nothing_is_left_when_workers_are_killed_or_stopped() -> None:
    """Descriptors and mappings go with the worker they belonged to."""
    before = set(Path("/proc/self/fd").iterdir())
    with manager() as managed:
        managed.run_sync(jobs.echo, np.ones(100_000))
        assert mappings() == 2
        (worker,) = managed.stats().pools[0].workers
        assert worker.pid is not None
        os.kill(worker.pid, 9)
        wait_until(lambda: mappings() == 0, message="the dead worker's segments are mapped")
        managed.run_sync(jobs.echo, np.ones(100_000))
    assert mappings() == 0
    assert len(set(Path("/proc/self/fd").iterdir())) <= len(before)


@given(
    st.recursive(
        st.binary(max_size=50) | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=20,
    ),
    st.lists(st.binary(max_size=100).map(bytearray), max_size=4),
)
@settings(deadline=None)
def test_a_payload_is_the_same_by_socket_and_by_segment(
    plain: Any, buffers: list[bytearray]
) -> None:
    """``layout`` describes both."""
    value = (plain, [pickle.PickleBuffer(buffer) for buffer in buffers])
    payload = dump(value, pieces=True)
    first, *rest = payload.frame(1)
    body = bytes(first)[8:] + b"".join(map(bytes, rest))
    by_socket = load_parts(body)
    segment = Segment.create(payload.size)
    try:
        segment.write(payload)
        by_memory = segment.read(payload.layout())
        assert by_memory[0] == by_socket[0] == plain
        assert [bytes(b) for b in by_memory[1]] == [bytes(b) for b in by_socket[1]] == buffers
        assert segment.in_use == bool(buffers)
        del by_memory
        assert not segment.in_use
    finally:
        segment.close()


def test_a_payload_counts_its_bytes() -> None:
    """``size`` bounds what the segment needs, alignment included."""
    payload = Payload([b"abc"], [memoryview(b"x" * 100)])
    assert payload.size >= 103
