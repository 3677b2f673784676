"""Functions with signal handlers that raise, and with timers that they leave behind."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from leasepool_django.backends.process import worker
from tests.process_jobs import announce

TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class TooLateError(TimeoutError):
    """As libraries for time-outs raise it out of a signal handler; an OSError to Python."""


def raise_too_late(signum: int, frame: object) -> NoReturn:
    raise TooLateError("the alarm")


def log_until_interrupted(path: Path, size: int) -> bool:
    """Log a record that cannot be sent until ``path`` is there; whether the alarm was heard."""
    logger = logging.getLogger("tests.worker")

    def strike(signum: int, frame: object) -> NoReturn:
        announce(path)
        raise_too_late(signum, frame)

    before = signal.signal(signal.SIGALRM, strike)
    logger.info("first")
    heard = False
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        logger.info("x" * size)
    except TooLateError:
        heard = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    logger.info("after")
    return heard


def set_timers(seconds: float = 1000.0) -> int:
    """Leave all timers running, those of processor time with handlers; return the pid."""
    for number in (signal.SIGVTALRM, signal.SIGPROF):
        signal.signal(number, raise_too_late)
    for timer in TIMERS:
        signal.setitimer(timer, seconds)
    return os.getpid()


def set_alarm() -> int:
    """Leave an alarm without a handler, which would end the process."""
    signal.alarm(1000)
    return os.getpid()


def set_timers_and_raise() -> NoReturn:
    set_timers()
    raise ValueError("with timers")


def timers() -> list[bool]:
    """Whether each timer runs."""
    return [signal.getitimer(timer)[0] > 0 for timer in TIMERS]


def leave_raising_handler() -> None:
    """Let the next SIGUSR1 raise, whoever gets it."""
    signal.signal(signal.SIGUSR1, raise_too_late)


def shut_own_socket() -> str:
    """Shut this worker's connection down without closing it."""
    for number in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as own:
                    own.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOTCONN):
                raise
    return "shut"


def clear_modules() -> NoReturn:
    sys.modules.clear()
    raise ValueError("without modules")


def damage_worker() -> str:
    """Break what runs after every function."""
    worker.pack = None  # type: ignore[assignment]
    return "damaged"


def leave_orphans(count: int) -> int:
    """Start programs whose parents end before them; return the worker's pid."""
    script = f"for number in $(seq {count}); do (sleep 0 &); done"
    subprocess.run(["sh", "-c", script], check=True)
    return os.getpid()


def leave_running_programs(count: int) -> tuple[int, ...]:
    """Start programs that this worker means to wait for later; return its pid and theirs."""
    programs.extend(subprocess.Popen(["sh", "-c", f"exit {number}"]) for number in range(count))
    return os.getpid(), *[program.pid for program in programs]


programs: list[subprocess.Popen[bytes]] = []


def statuses() -> list[int]:
    """Wait for the programs; return their statuses."""
    found = [program.wait(20) for program in programs]
    programs.clear()
    return found


def blocked_after_fork() -> tuple[bool, bool]:
    """Block SIGTERM and fork; whether it is still blocked here, and in the child."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        child = os.fork()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        if not child:
            os._exit(signal.SIGTERM in mask and signal.SIGINT not in mask)
        _, status = os.waitpid(child, 0)
        return (
            signal.SIGTERM in mask and signal.SIGINT not in mask,
            os.waitstatus_to_exitcode(status) == 1,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def handlers_in_grandchild() -> bool:
    """Whether a handler that a child has installed is there in a child of its own."""
    child = os.fork()
    if not child:
        default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, raise_too_late)
        grandchild = os.fork()
        if not grandchild:
            os._exit(default and signal.getsignal(signal.SIGTERM) is raise_too_late)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
