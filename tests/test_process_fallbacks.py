"""Where the kernel lacks or forbids something, the same promises are kept by other means."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from leasepool_django.backends.process import system
from tests.process_pools import run_program, start_program
from tests.process_table import children, fork_servers, identify, wait_gone
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere there is nothing to fall back from"
)

# A filter for system calls, as container runtimes install it; children inherit it.
FORBID = """
import ctypes, os, platform, sys

PIDFD_OPEN = 434  # the same number on every architecture
MEMFD_CREATE = {"x86_64": 319}.get(platform.machine(), 279)
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
SECCOMP_MODE_FILTER, ALLOW, ERRNO = 2, 0x7FFF0000, 0x00050000


class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint32)]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]


def forbid(system_call, number):
    instructions = (Instruction * 4)(
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x15, 0, 1, system_call),  # equal?
        (0x06, 0, 0, ERRNO | number),
        (0x06, 0, 0, ALLOW),
    )
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    program = Program(len(instructions), instructions)
    done = libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    assert done == 0, os.strerror(ctypes.get_errno())


def forbid_pidfds(number):
    forbid(PIDFD_OPEN, number)
    try:
        os.pidfd_open(os.getpid())
    except OSError as error:
        assert error.errno == number
    else:
        raise AssertionError("the filter does nothing")
"""

HARM = """
import asyncio, os, signal, sys
from pathlib import Path
from leasepool_django import (
    CallTimeoutError, LeasedExecutorManager, LeaseExpiredError, WorkerCrashedError
)
from tests import process_jobs as jobs
from tests.process_pools import assert_full_capacity
from tests.process_table import fork_servers, identify, wait_gone, worker_pids
from tests.waiting import async_wait_until


async def burning(path):
    await async_wait_until(path.exists)
    return [identify(int(pid)) for pid in path.read_text().split()]


async def cancel(manager, folder):
    task = asyncio.create_task(manager.run(jobs.start_and_spin, folder / "cancelled"))
    processes = await burning(folder / "cancelled")
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        wait_gone(processes, timeout=1)
        print("cancelled", len(processes))


async def time_out(manager, folder):
    options = manager.options(call_timeout=2)
    task = asyncio.create_task(options.run(jobs.start_and_spin, folder / "late"))
    processes = await burning(folder / "late")
    try:
        await task
    except CallTimeoutError:
        wait_gone(processes, timeout=1)
        print("timed out", len(processes))


async def expire(manager, folder):
    async with manager.lease(lease_seconds=0.3) as lease:
        try:
            await lease.run(jobs.spin)
        except LeaseExpiredError:
            print("expired")


def main():
    folder = Path(sys.argv[1])
    manager = LeasedExecutorManager(
        max_pools=1, workers_per_pool=2, lease_grace_seconds=0.3, mp_context=sys.argv[2]
    )
    manager.start_sync()
    if "sitecustomize" in sys.modules and hasattr(sys.modules["sitecustomize"], "with_children"):
        try:
            manager.run_sync(sys.modules["sitecustomize"].open, "/proc/self/task/1/children")
        except FileNotFoundError:
            print("no listing")
    for step in (cancel, time_out, expire):
        asyncio.run(step(manager, folder))
        assert_full_capacity(manager, folder)
    try:
        manager.run_sync(jobs.kill_own_process)
    except WorkerCrashedError as error:
        print(error.signal_name)
    os.kill(manager.run_sync(os.getpid), signal.SIGKILL)
    print(manager.run_sync(jobs.echo, "idle ones may die"))
    assert_full_capacity(manager, folder)
    workers = [identify(pid) for pid in worker_pids()]
    os.kill(fork_servers()[0], signal.SIGKILL)
    # A call that begins before they have died with it would rightly fail.
    wait_gone(workers, timeout=1)
    print(manager.run_sync(jobs.echo, "so may the fork server"))
    assert_full_capacity(manager, folder)
    manager.stop_sync()
"""

KEPT = [
    "cancelled 6",
    "timed out 6",
    "expired",
    "SIGKILL",
    "idle ones may die",
    "so may the fork server",
]

WITHOUT_PIDFDS = (
    FORBID
    + HARM
    + "\nif __name__ == '__main__':\n    forbid_pidfds(int(sys.argv[3]))\n    main()\n"
)


@pytest.mark.parametrize(
    ("method", "number"), [("forkserver", errno.EPERM), ("spawn", errno.ENOSYS)]
)
def test_without_process_descriptors_every_promise_is_kept(
    method: str, number: int, tmp_path: Path
) -> None:
    """Forbidden, or missing from an old kernel: the fork server does the killing."""
    ended = run_program(tmp_path, WITHOUT_PIDFDS, tmp_path, method, number)
    assert ended.stdout.splitlines() == KEPT, ended.stderr
    assert "Traceback" not in ended.stderr


STOPPED = (
    FORBID
    + """
from pathlib import Path
from leasepool_django import LeasedExecutorManager, WorkerCrashedError
from leasepool_django.backends.process import pool
from tests import process_jobs as jobs

if __name__ == "__main__":
    forbid_pidfds(1)
    pool.REPORT_SECONDS = 0.3
    manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
    manager.start_sync()
    try:
        manager.run_sync(jobs.stop_fork_server_and_die)
    except WorkerCrashedError as error:
        print(str(error).partition("; ")[2])
    print(manager.run_sync(jobs.echo, "served"))
    manager.stop_sync()
"""
)


def test_without_process_descriptors_no_caller_waits_for_a_stopped_fork_server(
    tmp_path: Path,
) -> None:
    ended = run_program(tmp_path, STOPPED)
    said, served = ended.stdout.splitlines()
    assert said == (
        "its end was not reported, because its fork server was stopped or hung. It has been "
        "replaced; the call was not repeated."
    )
    assert served == "served"


SERVER = (
    FORBID
    + """
from pathlib import Path
from leasepool_django import LeasedExecutorManager
from tests import process_jobs as jobs

if __name__ == "__main__":
    forbid_pidfds(1)
    manager = LeasedExecutorManager(max_pools=1, workers_per_pool=2)
    manager.start_sync()
    manager.run_sync(jobs.start_and_spin, Path(sys.argv[1]))
"""
)


def test_without_process_descriptors_nothing_outlives_a_killed_server(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    with start_program(tmp_path, SERVER, path) as server:
        try:
            wait_until(path.exists, timeout=20)
            processes = [identify(int(pid)) for pid in path.read_text().split()]
            (fork_server,) = fork_servers(server.pid)
            processes += map(identify, [fork_server, *children(fork_server)])
        finally:
            os.kill(server.pid, signal.SIGKILL)
        wait_gone(processes, timeout=1)


# --- the tray -------------------------------------------------------------------------------------

WITHOUT_TRAY = (
    FORBID
    + HARM
    + """
from leasepool_django.backends.process.tray import Tray


def forbid_proc():
    os_open = os.open

    def open(path, *arguments, **options):
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(13, "Permission denied", path)
        return os_open(path, *arguments, **options)

    os.open = open


if __name__ == '__main__':
    if sys.argv[3] == "memfd":
        forbid(MEMFD_CREATE, 1)
    else:
        forbid_proc()
    print(Tray.create())
    main()
"""
)


@pytest.mark.parametrize("forbidden", ["memfd", "/proc"])
def test_without_a_tray_every_promise_is_kept(forbidden: str, tmp_path: Path) -> None:
    """Where a sandbox forbids what it needs, all calls go over the socket."""
    ended = run_program(tmp_path, WITHOUT_TRAY, tmp_path, "forkserver", forbidden)
    assert ended.stdout.splitlines() == ["None", *KEPT], ended.stderr
    assert "Traceback" not in ended.stderr


# --- the listing of children ----------------------------------------------------------------------

# Read by every interpreter that starts with its folder on the path.
WITHOUT_CHILDREN = """
import builtins

with_children = builtins.open


def open(file, *arguments, **options):
    if isinstance(file, str) and file.startswith("/proc/") and file.endswith("/children"):
        raise FileNotFoundError(2, "No such file or directory", file)
    return with_children(file, *arguments, **options)


builtins.open = open
"""


def test_without_the_kernels_listing_of_children_every_promise_is_kept(tmp_path: Path) -> None:
    """Some kernels are built without ``CONFIG_PROC_CHILDREN``."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WITHOUT_CHILDREN)
    path = os.pathsep.join([str(site), str(Path(__file__).parents[1])])
    text = HARM + "\nif __name__ == '__main__':\n    main()\n"
    ended = run_program(tmp_path, text, tmp_path, "forkserver", env={"PYTHONPATH": path})
    assert ended.stdout.splitlines() == ["no listing", *KEPT], ended.stderr


def test_children_are_found_without_the_kernels_listing() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        found = system._children_by_stat(os.getpid())
        assert child.pid in found
        assert set(found) == set(system.children(os.getpid())) | set(other_threads_children())
    assert system._children_by_stat(child.pid) == []


def other_threads_children() -> list[int]:
    """Return children that the kernel lists with another thread of this process."""
    found: list[int] = []
    for listing in Path("/proc/self/task").glob("*/children"):
        found += map(int, listing.read_text().split())
    return found
