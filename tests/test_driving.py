"""What may go wrong around one call: drivers that take turns, a death in the middle, garbage."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leasepool_django import CallTimeoutError, LeasedExecutorManager, WorkerCrashedError
from leasepool_django.backends.process import wire
from leasepool_django.backends.process.outbox import Outbox
from leasepool_django.backends.process.shared import Segment
from tests import fault_jobs, shared_jobs
from tests import process_jobs as jobs
from tests.conftest import LoopRunner
from tests.process_pools import (
    CALLERS,
    Caller,
    assert_full_capacity,
    run_program,
    running,
    start_program,
)
from tests.process_table import state, worker_pids
from tests.waiting import async_wait_until, wait_until

LARGE = bytes(1_000_000)

each_caller = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)


def test_a_worker_goes_from_threads_to_loops_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its outcome a call hands the worker to the next caller, on whatever thread that is."""
    count = 400

    async def on_loop(manager: LeasedExecutorManager) -> list[int]:
        async with asyncio.timeout(60):
            return [await manager.run(jobs.echo, n) for n in range(count)]

    def in_thread(manager: LeasedExecutorManager) -> list[int]:
        return [manager.run_sync(jobs.echo, n) for n in range(count)]

    before = sys.getswitchinterval()
    with running() as manager, ThreadPoolExecutor(4) as threads:
        sys.setswitchinterval(1e-5)
        try:
            answers = [
                *(threads.submit(in_thread, manager) for _ in range(2)),
                *(threads.submit(asyncio.run, on_loop(manager)) for _ in range(2)),
            ]
            for answer in answers:
                assert answer.result(60) == list(range(count))
        finally:
            sys.setswitchinterval(before)


def test_a_worker_that_dies_waiting_for_memory_for_its_result_runs_the_call_once(
    tmp_path: Path, loop_runner: LoopRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offer is left unread, as a call is that was never received."""
    offer = Outbox.offer_results

    def offer_to_a_dead_one(outbox: Outbox, size: int, **options: bool) -> None:
        (worker,) = worker_pids()
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: state(worker) == "T")
        offer(outbox, size, **options)
        os.kill(worker, signal.SIGKILL)

    monkeypatch.setattr(Outbox, "offer_results", offer_to_a_dead_one)
    mark = tmp_path / "mark"
    with running() as manager:
        with pytest.raises(WorkerCrashedError, match="was killed by SIGKILL"):
            loop_runner(manager.run(fault_jobs.mark_and_return, mark, 1 << 20))
        with pytest.raises(WorkerCrashedError, match="was killed by SIGKILL"):
            manager.run_sync(fault_jobs.mark_and_return, mark, 1 << 20)
        assert len(mark.read_text().splitlines()) == 2
        assert_full_capacity(manager, tmp_path)


@each_caller
def test_a_worker_that_dies_waiting_for_its_argument_begins_no_call_twice(
    caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has said that it has the call, so nobody knows that it has not begun."""
    offer = Outbox.offer_arguments

    def offer_to_a_dead_one(outbox: Outbox) -> None:
        (worker,) = worker_pids()
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: state(worker) == "T")
        offer(outbox)
        os.kill(worker, signal.SIGKILL)

    mark = tmp_path / "mark"
    with running() as manager:
        with monkeypatch.context() as patched:
            patched.setattr(Outbox, "offer_arguments", offer_to_a_dead_one)
            error = caller.outcome(manager, fault_jobs.mark_and_return, mark, LARGE)
        assert type(error) is WorkerCrashedError
        assert "was killed by SIGKILL" in str(error)
        assert not mark.exists()
        assert_full_capacity(manager, tmp_path)


@each_caller
def test_where_no_descriptor_can_be_sent_an_argument_is_an_error_and_a_result_arrives(
    caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when too many of one user's are on their way. Nobody waits for ever."""
    flush = Outbox.flush

    def refuse(outbox: Outbox) -> None:
        if outbox._descriptor is not None:  # private: what the system would refuse
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        flush(outbox)

    with running() as manager:
        pid = manager.run_sync(os.getpid)
        with monkeypatch.context() as patched:
            patched.setattr(Outbox, "flush", refuse)
            for _ in range(2):
                error = caller.outcome(manager, len, LARGE)
                assert type(error) is OSError
                assert "no memory was free for the argument's shared memory" in str(error)
                assert caller.outcome(manager, bytes, len(LARGE)) == LARGE
        assert caller.outcome(manager, len, LARGE) == len(LARGE)
        assert manager.run_sync(os.getpid) == pid
        assert_full_capacity(manager, tmp_path)


@each_caller
def test_a_handler_that_raises_while_an_argument_is_awaited_costs_no_other_call(
    caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function has left it behind. The answer that is then left unread is nobody's."""
    offer = Outbox.offer_arguments

    def interrupt_and_offer(outbox: Outbox) -> None:
        (worker,) = worker_pids()
        wait_until(lambda: state(worker) == "S")
        os.kill(worker, signal.SIGUSR1)
        wait_until(lambda: state(worker) in {"Z", ""})
        offer(outbox)

    with running() as manager:
        manager.run_sync(fault_jobs.raise_at, signal.SIGUSR1)
        with monkeypatch.context() as patched:
            patched.setattr(Outbox, "offer_arguments", interrupt_and_offer)
            error = caller.outcome(manager, len, LARGE)
        assert type(error) is WorkerCrashedError
        assert manager.run_sync(len, LARGE) == len(LARGE)
        assert_full_capacity(manager, tmp_path)


@each_caller
@pytest.mark.parametrize("body", [b"", b"more"])
def test_a_forged_request_for_an_argument_costs_the_worker_alone(
    caller: Caller, body: bytes, tmp_path: Path
) -> None:
    """The call has not come by shared memory."""
    with running() as manager:
        error = caller.outcome(manager, fault_jobs.forge, wire.frame(wire.FETCH, body))
        assert type(error) is WorkerCrashedError
        assert "something wrote into its connection" in str(error)
        assert_full_capacity(manager, tmp_path)


@each_caller
@pytest.mark.parametrize(
    "body",
    [
        pickle.dumps((1 << 20,)),
        b"rubbish",
        b"8 bytes.",
        (1 << 29).to_bytes(8, "little") + b"more",
        (0).to_bytes(8, "little"),
        # More than any worker may ask for.
        ((1 << 29) + 1).to_bytes(8, "little"),
    ],
)
def test_a_forged_request_for_memory_costs_the_worker_alone(
    caller: Caller, body: bytes, tmp_path: Path
) -> None:
    """Nothing of it is unpickled, and nothing made for it."""
    with running() as manager:
        error = caller.outcome(manager, fault_jobs.forge, wire.frame(wire.NEED, body))
        assert type(error) is WorkerCrashedError
        assert "something wrote into its connection" in str(error)
        assert_full_capacity(manager, tmp_path)


@each_caller
def test_a_forged_beginning_of_a_large_result_ends_with_the_time_out(
    caller: Caller, tmp_path: Path
) -> None:
    """What the worker says afterwards is taken for a part of it."""
    header = wire.pack(1 << 38 | wire.RESULT)
    with running(call_timeout=1) as manager:
        assert type(caller.outcome(manager, fault_jobs.forge, header)) is CallTimeoutError
        assert_full_capacity(manager, tmp_path)


@each_caller
def test_an_outcome_that_cannot_be_dealt_with_costs_the_worker_and_not_the_caller(
    caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may have closed descriptors that it does not own."""

    give_up = Outbox.give_up_arguments

    def fail_once(outbox: Outbox) -> None:
        monkeypatch.setattr(Outbox, "give_up_arguments", give_up)
        give_up(outbox)
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    kept = np.ones(100_000)
    with running() as manager:
        assert caller(manager, shared_jobs.echo, kept).sum() == 100_000
        monkeypatch.setattr(Outbox, "give_up_arguments", fail_once)
        with pytest.raises(WorkerCrashedError, match="something wrote into its connection"):
            caller(manager, shared_jobs.keep, kept)
        assert_full_capacity(manager, tmp_path)


def test_a_call_that_cannot_be_begun_costs_neither_its_predecessor_nor_itself_an_answer(
    loop_runner: LoopRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is begun where its predecessor ends."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    async def calls() -> list[object]:
        first = asyncio.create_task(manager.run(jobs.hold, tmp_path))
        second = asyncio.create_task(manager.run(jobs.echo, bytes(1 << 20)))
        await async_wait_until(lambda: manager.stats().waiting == 1)
        (tmp_path / "go").touch()
        async with asyncio.timeout(20):
            await asyncio.wait([first, second])
        return [first.result(), second.exception()]

    with running() as manager:
        pid = manager.run_sync(os.getpid)
        with monkeypatch.context() as patch:
            patch.setattr(Segment, "write", fail)
            first, second = loop_runner(calls())
        assert first == pid
        assert type(second) is MemoryError
        assert_full_capacity(manager, tmp_path)


INTERRUPTED = """
    import os, sys
    from pathlib import Path
    from leasepool_django import LeasedExecutorManager
    from tests import process_jobs as jobs

    if __name__ == "__main__":
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
        manager.start_sync()
        pid = manager.run_sync(os.getpid)
        try:
            manager.run_sync(getattr(jobs, sys.argv[2]), Path(sys.argv[1]), *map(int, sys.argv[3:]))
        except KeyboardInterrupt:
            print("interrupted")
        print(manager.run_sync(os.getpid) == pid, manager.stats().workers_killed)
        manager.stop_sync()
"""


@pytest.mark.parametrize(
    "job",
    [("return_slow", 10), ("return_slow", 1 << 20), ("raise_slow",)],
    ids=["by socket", "by shared memory", "exception"],
)
def test_ctrl_c_while_an_outcome_is_unpickled_interrupts_the_caller(
    job: tuple[Any, ...], tmp_path: Path
) -> None:
    """Its worker has done its work, and lives on."""
    path = tmp_path / "arriving"
    with start_program(tmp_path, INTERRUPTED, path, *job) as program:
        wait_until(path.exists, timeout=20)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=20)
    assert out.splitlines() == ["interrupted", "True 0"], err


GARBAGE = """
    import asyncio
    import gc
    import threading

    from leasepool_django import LeasedExecutorManager, NotPicklableError
    from tests import fault_jobs

    manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)


    async def keep_errors(lease):
        data = memoryview(bytes(1 << 20))
        late, patient = manager.options(call_timeout=0.05), manager.options(timeout=0.01)
        for run in (lease.run, late.run, lambda *call: asyncio.wait_for(patient.run(*call), 0.05)):
            try:
                await run(fault_jobs.length_later, data)
            except Exception as error:
                kept = error
        for run in (lease.run_sync, late.run_sync):
            try:
                run(fault_jobs.length_later, data)
            except Exception as error:
                kept = error
        try:
            await manager.run(fault_jobs.length_later, data, threading.Lock())
        except NotPicklableError as error:
            kept = error
        return kept


    if __name__ == "__main__":
        with asyncio.Runner() as runner:
            runner.run(manager.start())
            lease = runner.run(manager.acquire())
            runner.run(lease.release())
            gc.disable()
            for _ in range(3):
                print(type(runner.run(keep_errors(lease))).__name__)
                gc.collect()
            runner.run(manager.stop(grace=0))
"""


def test_errors_that_become_garbage_with_a_memoryview_do_no_harm(tmp_path: Path) -> None:
    """Interpreters up to 3.12.6 crash when a memoryview is collected with a buffer of it."""
    ended = run_program(tmp_path, GARBAGE)
    assert ended.returncode == 0, ended.stderr
    assert "BufferError" not in ended.stderr
    assert ended.stdout.split() == ["NotPicklableError"] * 3


@pytest.mark.parametrize("blocking", [False, True])
def test_an_error_does_not_keep_what_was_sent(blocking: bool, loop_runner: LoopRunner) -> None:  # noqa: FBT001
    """Whoever keeps the error, or the worker that was killed, keeps no buffer of the argument."""
    data = memoryview(bytes(1 << 20))
    with running() as manager:
        late = manager.options(call_timeout=0.1)

        def run() -> object:
            if blocking:
                return late.run_sync(fault_jobs.length_later, data)
            return loop_runner(late.run(fault_jobs.length_later, data))

        with pytest.raises(CallTimeoutError) as caught:
            run()
        data.release()
        assert "length_later" in str(caught.value)
