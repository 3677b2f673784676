"""Shared memory where the system grants little of it, and when the server is killed."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leasepool_django.backends.process import driver, shared
from tests import shared_jobs as jobs
from tests.process_pools import CALLERS, Caller, run_program, running, start_program
from tests.process_table import children, command_line, identify, wait_gone
from tests.waiting import wait_until

each_caller = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)

pytestmark = pytest.mark.skipif(not shared.AVAILABLE, reason="needs memfd_create (Linux)")


def mappings() -> int:
    """Count this process's mappings of segments, once nothing waits for the collector."""
    gc.collect()
    return jobs.shared_memory_in_use()


@each_caller
def test_both_segments_of_a_worker_share_the_cap(caller: Caller) -> None:
    """The one that is not in use makes room; if both are, the socket carries the result."""
    cap = 3_000_000
    large, half, small = np.ones(250_000), np.ones(160_000), np.ones(20_000)  # 2, 1.28, 0.16 MB
    with running(max_shared_bytes=cap) as manager:

        def run(segments: int, fn: Callable[..., Any], *args: Any) -> float:
            total = np.sum(caller.outcome(manager, fn, *args))  # and the result is let go
            assert manager.run_sync(jobs.shared_memory_in_use) == segments
            assert 0 < manager.run_sync(jobs.shared_bytes) <= cap
            return float(total)

        for _ in range(3):
            assert run(1, jobs.repeated, large, 1) == 250_000
            assert run(1, jobs.fill, 250_000, 2.0) == 500_000
            assert run(1, np.sum, large) == 250_000
            assert run(1, jobs.fill, 250_000, 2.0) == 500_000
            for _ in range(2):
                assert run(2, jobs.repeated, half, 1) == 160_000
            assert run(1, np.sum, large) == 250_000
            # The room for the argument is not more than is needed, from the second time on.
            assert run(1, jobs.repeated, small, 10) == 200_000
            for _ in range(2):
                assert run(2, jobs.repeated, small, 10) == 200_000


def test_a_payload_beyond_the_cap_goes_over_the_socket() -> None:
    """``max_shared_bytes`` bounds what a worker's segments hold; 0 switches them off."""
    for cap in (0, 200_000):
        with running(max_shared_bytes=cap) as manager:
            values = np.arange(100_000, dtype=np.float64)
            assert (manager.run_sync(jobs.echo, values) == values).all()
            assert manager.run_sync(jobs.is_aligned, values)
            assert manager.run_sync(jobs.shared_memory_in_use) == 0
            assert mappings() == 0


@each_caller
def test_memory_is_given_back_after_a_call_that_took_longer_than_it_is_kept(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(driver, "KEEP_SECONDS", 0.2)
    looks: list[int | None] = []
    look = driver.ProcessWorker.look_after_memory

    def spy(worker: driver.ProcessWorker) -> None:
        look(worker)
        looks.append(worker.pid)

    monkeypatch.setattr(driver.ProcessWorker, "look_after_memory", spy)
    with running() as manager, ThreadPoolExecutor(1) as thread:
        large = np.ones(100_000)
        holding = thread.submit(caller.outcome, manager, jobs.hold_beside, tmp_path, large)
        wait_until((tmp_path / "holding").exists, timeout=20)
        before = len(looks)
        wait_until(lambda: len(looks) > before + 1, timeout=20)
        assert mappings() == 1
        (tmp_path / "go").touch()
        assert holding.result(20) == 100_000
        wait_until(lambda: mappings() == 0, timeout=20, message="it is still there")


LIMITED = """
    import resource, sys
    from pathlib import Path
    from leasepool_django import LeasedExecutorManager
    from tests import shared_jobs as jobs

    def room_for(size):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return pages * resource.getpagesize() + size

    if __name__ == "__main__":
        value = bytes(200_000_000)
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
        manager.start_sync()
        kind, size = {
            "files": (resource.RLIMIT_FSIZE, 1_000_000),
            "memory": (resource.RLIMIT_AS, room_for(100_000_000)),
        }[sys.argv[1]]
        resource.setrlimit(kind, (size, resource.RLIM_INFINITY))
        assert manager.run_sync(len, value) == len(value)
        assert jobs.shared_memory_in_use() == 0
        assert manager.run_sync(jobs.shared_memory_in_use) == 0
        assert manager.run_sync(jobs.echo, value[:2_000_000]) == value[:2_000_000]
        manager.stop_sync()
        print("arrived")
"""


@pytest.mark.parametrize("limit", ["files", "memory"])
def test_under_a_limit_of_the_server_the_socket_carries_what_is_too_large(
    limit: str, tmp_path: Path
) -> None:
    """A real limit is an error that is dealt with, and no signal ends the server."""
    ended = run_program(tmp_path, LIMITED, limit)
    assert ended.stdout == "arrived\n", ended.stderr


FORKING = """
    import os
    from leasepool_django import LeasedExecutorManager, WorkerCrashedError
    from tests import shared_jobs as jobs
    from tests.waiting import wait_until

    if __name__ == "__main__":
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
        manager.start_sync()
        kept = manager.run_sync(jobs.fill, 1_000_000, 3.0)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)
            os._exit(not (kept == 3.0).all())
        del kept
        try:
            manager.run_sync(os.abort)
        except WorkerCrashedError:
            wait_until(lambda: jobs.shared_memory_in_use() == 0)
            os.close(writer)
            print(os.waitpid(child, 0)[1])
        manager.stop_sync()
"""


def test_a_result_that_a_fork_of_the_server_keeps_outlives_its_worker(tmp_path: Path) -> None:
    """Large memory of a dead worker is given up, but for what another process may see in it."""
    ended = run_program(tmp_path, FORKING)
    assert ended.stdout == "0\n", ended.stderr


SHARING = """
    import sys
    from pathlib import Path
    import numpy as np
    from leasepool_django import LeasedExecutorManager
    from tests import process_jobs, shared_jobs as jobs

    if __name__ == "__main__":
        folder = Path(sys.argv[1])
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
        manager.start_sync()
        kept = manager.run_sync(jobs.fill, 200_000, 1.0)
        manager.run_sync(jobs.keep, np.ones(200_000))
        again = manager.run_sync(jobs.echo, np.ones(200_000))
        found = jobs.segments() | manager.run_sync(jobs.segments)
        (folder / "new").write_text(" ".join(found))
        (folder / "new").rename(folder / "segments")
        manager.run_sync(process_jobs.spin, folder / "spinning")
"""


def holders(segments: set[str]) -> Iterator[Path]:
    """The processes that have one of ``segments`` mapped or open."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            lines = (process / "maps").read_text().splitlines()
            mapped = {"/".join(line.split()[3:5]) for line in lines}
            opened = {jobs.file_of(entry.stat()) for entry in (process / "fd").iterdir()}
        except OSError:
            continue  # gone meanwhile
        if segments & (mapped | opened):
            yield process


def test_no_shared_memory_is_left_when_the_server_is_killed(tmp_path: Path) -> None:
    """Neither what is in use for both directions, nor what function and caller have kept."""
    listing = tmp_path / "segments"
    with start_program(tmp_path, SHARING, tmp_path) as server:
        try:
            wait_until((tmp_path / "spinning").exists, timeout=30)
            segments = set(listing.read_text().split())
            assert len(segments) >= 4
            processes = [
                identify(pid)
                for fork_server in children(server.pid)
                for pid in [fork_server, *children(fork_server)]
            ]
            assert len(list(holders(segments))) == 2
        finally:
            os.kill(server.pid, signal.SIGKILL)
        server.wait(10)
        wait_gone(processes, timeout=10)
    wait_until(
        lambda: not [*holders(segments)],
        timeout=10,
        message=lambda: str([command_line(int(path.name)) for path in holders(segments)]),
    )
