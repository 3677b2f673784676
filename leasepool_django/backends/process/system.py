"""What the operating system offers for keeping processes in order, with what to do without it.

Linux has all of it; elsewhere the missing part is a no-op and the docstring says what replaces it.
Standard library only.
"""

# Every worker imports this module, and pathlib only for it:
# ruff: noqa: PTH123, PTH208
from __future__ import annotations

import errno
import os
import re
import select
import signal
import sys
from contextlib import suppress
from functools import cache
from time import monotonic
from typing import Any

if sys.platform != "win32":  # where settings are read all the same
    import resource

__all__ = [
    "adopt_orphans",
    "ask_for_time_slice",
    "children",
    "dead_children",
    "die_with_parent",
    "ended_child",
    "has_ended",
    "kill_group",
    "kill_marked",
    "live_on",
    "mark_of_this_process",
    "open_pidfd",
    "open_standard_descriptors",
    "raise_oom_score",
    "reap",
    "resident_bytes",
    "wait_for_end",
]

LINUX = sys.platform.startswith("linux")
TUNABLES = "GLIBC_TUNABLES"  # the environment variable that glibc reads when a process starts
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MADV_WIPEONFORK = 18
# sched_setattr(2) by machine, of 64 bits; few C libraries have a function for it.
_SCHED_FLAG_KEEP_POLICY = 8
_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345}


def _prctl(option: int, value: int) -> None:
    if not LINUX:
        return
    if _libc().prctl(option, value, 0, 0, 0) != 0:
        import ctypes

        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@cache
def _libc() -> Any:
    import ctypes  # here: the server, which imports this module too, has no use for it

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    libc.syscall.restype = ctypes.c_long
    return libc


def ask_for_time_slice(seconds: float) -> None:
    """Ask the scheduler to let this thread run for ``seconds`` at a time (Linux 6.12 and later).

    It changes when the thread runs, and not how much. One with shorter slices, as all have by
    default, that wakes and has had less than its share may then go first at once; otherwise it
    waits until the one that runs has had its slice, of some milliseconds. A kernel or sandbox that
    refuses leaves the slice as it is.
    """
    system = os.uname()
    number = _SYS_SCHED_SETATTR.get(system.machine) if sys.maxsize > 1 << 32 else None
    if not LINUX or number is None or _version(system.release) < (6, 12):
        return
    import struct

    nice = os.getpriority(os.PRIO_PROCESS, 0)
    # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
    values = (48, 0, _SCHED_FLAG_KEEP_POLICY, nice, 0, int(seconds * 1e9), 0, 0)
    _libc().syscall(number, 0, struct.pack("=IIQiIQQQ", *values), 0)


def _version(release: str) -> tuple[int, int]:
    numbers = re.findall(r"\d+", release)[:2]
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else (0, 0)


def open_standard_descriptors() -> None:
    """Open those of 0, 1 and 2 that are closed on the null device.

    Whatever is opened later would get their numbers, and with them what is printed.
    """
    opened = os.open(os.devnull, os.O_RDWR)
    while opened <= 2:
        os.set_inheritable(opened, True)
        opened = os.open(os.devnull, os.O_RDWR)
    os.close(opened)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has died (Linux).

    Elsewhere they go to init, and only those still in a worker's process group are found.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def live_on(signum: int, frame: object) -> None:
    """A signal handler that lets the process live on: the server decides when it ends."""


class _PidMark:
    def __init__(self) -> None:
        self._pid = os.getpid()

    def __getitem__(self, index: int) -> bool:
        return os.getpid() == self._pid


def mark_of_this_process() -> Any:
    """Give something whose item 0 is true here, and false in children that were forked after it.

    Also in those that a library of C has forked. On Linux it is a page of memory that the kernel
    wipes there: to ask it takes a tenth of a system call.
    """
    if LINUX:
        import mmap

        page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            page.madvise(_MADV_WIPEONFORK)
        except (OSError, ValueError):  # a kernel before 4.14, or a sandbox
            page.close()
        else:
            page[0] = 1
            return page
    return _PidMark()


def die_with_parent(parent: int) -> None:
    """Be killed as soon as the process ``parent`` is gone (Linux); exits if it already is.

    Safe only because the fork server is single-threaded: the signal follows the forking *thread*.
    Elsewhere the end of the worker's socket does it once the worker is idle.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def open_pidfd(pid: int) -> int | None:
    """A descriptor for the process, or ``None`` where there are none or they are forbidden."""
    opener: Any = getattr(os, "pidfd_open", None)
    if opener is None:
        return None
    try:
        return int(opener(pid))
    except PermissionError:  # an old seccomp profile: the fork server does the killing
        return None
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return None
        raise


def children(pid: int) -> list[int]:
    """The direct children of ``pid``, zombies included (Linux; elsewhere none)."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as listing:
            return [int(word) for word in listing.read().split()]
    except FileNotFoundError:
        return _children_by_stat(pid)


def _children_by_stat(pid: int) -> list[int]:
    # For kernels without CONFIG_PROC_CHILDREN.
    found = []
    for entry in _processes():
        try:
            with open(f"/proc/{entry}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(entry)
    return found


def dead_children() -> int:
    """How many children of this process have ended and not been waited for (Linux; else none)."""
    if not LINUX:
        return 0
    try:
        # One system call where there are none, as nearly always.
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return 0
        return sum(map(_is_dead, children(os.getpid())))
    except OSError:  # no child at all, or no descriptor is left to look with
        return 0


def _is_dead(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return stat.read().rpartition(b")")[2].split()[0] == b"Z"


# Where there is no waitid() (macOS before Python 3.13), to look is to reap.
_reaped: dict[int, int] = {}


def ended_child() -> int:
    """A child that has ended, to be given to ``reap``; 0 if there is none."""
    try:
        if hasattr(os, "waitid"):
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return 0 if found is None else found.si_pid
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0
    _reaped[pid] = status
    return pid


def wait_for_end(pid: int) -> None:
    """Wait until a child has ended, without reaping it where that is possible."""
    with suppress(ChildProcessError):
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        else:
            _reaped[pid] = os.waitpid(pid, 0)[1]


def reap(pid: int) -> int:
    """Let go of a child that has ended; its status as ``waitpid`` gives it."""
    status = _reaped.pop(pid, None)
    if status is None:
        try:
            _, status = os.waitpid(pid, 0)
        except ChildProcessError:
            return 0
    return status


def kill_group(pid: int) -> None:
    """Kill what is left of the group that a worker leads, or led."""
    with suppress(ProcessLookupError, PermissionError):  # nobody that this process may kill
        os.killpg(pid, signal.SIGKILL)


def has_ended(pidfd: int, within: float = 0.0) -> bool:
    """Whether the process of a descriptor has ended, or does so within some seconds."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(within * 1000))


def kill_marked(name: str, value: str) -> None:
    """Kill the processes that were started with ``name=value`` in their environment (Linux).

    Returns when they are gone; after a second or two if one of them cannot die. ``OSError`` if
    there is no descriptor left to look with.
    """
    entry = f"{name}={value}".encode()
    deadline = monotonic() + 1.0
    while True:
        killed = [pid for pid in _processes() if _has(pid, entry) and _kill_if(pid, entry)]
        # What was killed may just have started another one; the next round finds those.
        if not killed or monotonic() > deadline:
            return


def _processes() -> list[int]:
    try:
        return [int(word) for word in os.listdir("/proc") if word.isdigit()]
    except FileNotFoundError:
        return []


def _has(pid: int, entry: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environment:
            return entry in environment.read().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # gone, or another user's


def _kill_if(pid: int, entry: bytes) -> bool:
    """Whether it was there to be killed; waits for its end. Asked again, as the number is held."""
    pidfd = None
    try:
        pidfd = open_pidfd(pid)
        if not _has(pid, entry):
            return False
        if pidfd is None:
            os.kill(pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            has_ended(pidfd, within=1.0)
    except ProcessLookupError:
        return False
    finally:
        if pidfd is not None:
            os.close(pidfd)
    return True


def raise_oom_score() -> None:
    """Let the kernel's out-of-memory killer prefer this worker to the server (Linux)."""
    try:
        # Not open(): its objects would take longer than the rest of this.
        score = os.open("/proc/self/oom_score_adj", os.O_RDWR)
        try:
            os.pwrite(score, b"%d" % min(1000, int(os.pread(score, 16, 0)) + 300), 0)
        finally:
            os.close(score)
    except OSError:
        return  # not Linux, /proc is read-only, or no descriptor is left: it stays the server's


def resident_bytes() -> int:
    """The resident set size of this process in bytes."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux, or the function has used up the descriptors
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if LINUX else 1)
