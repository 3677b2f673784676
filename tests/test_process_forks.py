"""The server forks while its pools run: each process has its own workers, and ends by itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.process_pools import run_program, start_program
from tests.process_table import children, fork_servers, identify, wait_gone
from tests.waiting import wait_until

# Forking with other threads running is what servers do, and what Python 3.12 warns of.
QUIET = {"PYTHONWARNINGS": "ignore::DeprecationWarning"}

FORKING = """
    import asyncio, os, sys
    from collections import Counter
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from leasepool_django import LeasedExecutorManager
    from tests import process_jobs as jobs
    from tests.process_table import worker_pids
    from tests.waiting import async_wait_until


    def in_child(function):
        "Run it in a forked child, and return what it exits with."
        child = os.fork()
        if not child:
            code = 1
            try:
                function()
                code = 0
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1]


    def own_workers(manager, theirs):
        assert not manager.started
        assert manager.stats().pools == ()
        manager.start_sync()
        assert manager.run_sync(os.getpid) not in theirs
        assert asyncio.run(manager.run(jobs.echo, 3)) == 3
        manager.stop_sync()


    def no_copies(before):
        left = Counter(jobs.descriptors().values()) - before
        assert not left, left


    async def main(folder):
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=2, mp_context=sys.argv[2])
        own = Counter(jobs.descriptors().values())
        await manager.start()
        await manager.run(jobs.echo, bytes(1 << 20))
        task = asyncio.create_task(manager.run(jobs.hold, folder, "awaited"))
        with ThreadPoolExecutor(1) as thread:
            call = thread.submit(manager.run_sync, jobs.hold, folder, "blocking")
            await async_wait_until(lambda: len(list(folder.iterdir())) == 3)
            theirs = worker_pids()
            assert in_child(lambda: None) == 0
            assert in_child(lambda: no_copies(own)) == 0
            assert in_child(lambda: own_workers(manager, theirs)) == 0
            assert in_child(manager.stop_sync) == 0
            # A child that forgets nothing, and ends as any program does.
            with manager._dispatcher.lock:
                assert in_child(lambda: own_workers(manager, theirs)) == 0
            (folder / "go").touch()
            print(sorted([await task, call.result(10)]) == sorted(theirs))
        print(sorted(worker_pids()) == sorted(theirs), manager.stats().workers_crashed)
        await manager.stop()


    if __name__ == "__main__":
        asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_forked_child_has_workers_of_its_own_and_the_server_keeps_its(
    method: str, tmp_path: Path
) -> None:
    """Calls that ran meanwhile end as ever; the child has no copy of a pool's descriptors."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "here").touch()
    ended = run_program(tmp_path, FORKING, folder, method, env=QUIET)
    assert ended.stdout == "True\nTrue 0\n", ended.stderr
    # Such as one of a subprocess that is still running, of which the child knows nothing.
    assert "Warning" not in ended.stderr
    assert "Traceback" not in ended.stderr


SURVIVED = """
    import ctypes, os, signal, sys, threading
    from pathlib import Path
    from leasepool_django import LeasedExecutorManager
    from tests import process_jobs as jobs
    from tests.waiting import wait_until

    if __name__ == "__main__":
        path = Path(sys.argv[1])
        manager = LeasedExecutorManager(max_pools=1, workers_per_pool=2)
        manager.start_sync()
        threading.Thread(
            target=manager.run_sync, args=(jobs.start_and_spin, path / "pids"), daemon=True
        ).start()
        wait_until((path / "pids").exists)
        # A library's own fork runs none of Python's hooks: the child keeps every descriptor.
        fork = os.fork if sys.argv[2] == "python" else ctypes.PyDLL(None).fork
        child = fork()
        if child:
            jobs.announce(path / "child", str(child))
        while True:
            signal.pause()
"""


@pytest.mark.parametrize("forked_by", ["python", "c"])
def test_workers_follow_their_server_though_its_child_lives_on(
    forked_by: str, tmp_path: Path
) -> None:
    with start_program(tmp_path, SURVIVED, tmp_path, forked_by, env=QUIET) as server:
        try:
            wait_until((tmp_path / "child").exists, timeout=20)
            child = identify(int((tmp_path / "child").read_text()))
            processes = [identify(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
            (fork_server,) = fork_servers(server.pid)
            processes += map(identify, [fork_server, *children(fork_server)])
        finally:
            os.kill(server.pid, signal.SIGKILL)
        try:
            wait_gone(processes, timeout=1)
        finally:
            os.kill(child.pid, signal.SIGKILL)
        wait_gone([child], timeout=5)
