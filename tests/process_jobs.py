"""What the tests of the process backend let workers do: well-behaved, crashing and hostile work.

Long because it is a list of short functions, each of which has to be found by a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import errno
import fcntl
import functools
import gc
import itertools
import logging
import os
import pickle
import platform
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from tests.waiting import wait_until

SLEEP = "1000"

# --- well-behaved -----------------------------------------------------------------------------


def echo(value: Any = None, **named: Any) -> Any:
    return named or value


def announce(path: Path, text: str = "") -> None:
    """Let the test see ``path``, with ``text`` in it from the first moment."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.rename(path)


def leave_mark(path: Path) -> None:
    """Add a line to ``path``: a call that ran twice has left two."""
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")


def meet(folder: Path, parties: int) -> int:
    """Wait until ``parties`` workers are in here at the same time; return the worker's pid."""
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) >= parties, timeout=20)
    return os.getpid()


def hold(folder: Path, name: str = "holding") -> int:
    """Say so in ``folder / name``, wait for ``folder / "go"`` and return the worker's pid."""
    announce(folder / name, str(os.getpid()))
    wait_until((folder / "go").exists, timeout=20)
    return os.getpid()


def after(path: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Wait for ``path``, and call the function."""
    wait_until(path.exists, timeout=20)
    return function(*args)


def slow_failure() -> NoReturn:
    """Fail when the server has begun to wait."""
    time.sleep(0.01)
    raise ValueError


def slow_echo(value: object) -> object:
    """Return it when the server has begun to wait."""
    time.sleep(0.01)
    return value


def spin(path: Path | None = None) -> NoReturn:
    """Use a whole core, for ever."""
    if path is not None:
        announce(path, str(os.getpid()))
    while True:
        pass


def spin_with(path: Path, value: object) -> NoReturn:
    """The same, with something to hold."""
    spin(path)


def count_up() -> int:
    """Return how many times this worker was here."""
    return next(_counter)


_counter = itertools.count(1)


# --- what a worker is like --------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """Return facts about the worker's process."""
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "policy": os.sched_getscheduler(0),
        "threads": threading.active_count(),
    }


def time_slice() -> float:
    """Return the seconds that the scheduler lets this process run at a time; 0 if it does not say.

    By ``sched_getattr``, whose number is that of ``sched_setattr`` and one more.
    """
    attributes = ctypes.create_string_buffer(48)
    number = {"x86_64": 315, "aarch64": 275}.get(os.uname().machine)
    if number is None or not sys.platform.startswith("linux"):
        return 0.0
    if ctypes.CDLL(None).syscall(number, 0, attributes, 48, 0) != 0:
        return 0.0
    runtime: int = struct.unpack_from("=Q", attributes, 24)[0]
    return runtime / 1e9


def start_a_manager() -> None:
    from leasepool_django import LeasedExecutorManager

    LeasedExecutorManager(max_pools=1, workers_per_pool=1).start_sync()


def collections_since_prepared(module: str) -> list[int]:
    """How often each generation was collected since a module was imported."""
    now = [generation["collections"] for generation in gc.get_stats()]
    return [new - old for new, old in zip(now, attribute(module, "before"), strict=True)]


def run_command(command: list[str]) -> str:
    """What a program writes."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def asks_for_huge_pages() -> bool:
    """Whether the C library does so when it is told to, which depends on the kernel, too."""
    name, version = platform.libc_ver()
    knows = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return knows and mode.exists() and "[madvise]" in mode.read_text()


def address(module: str, name: str) -> int:
    """Where the last object of a list lies."""
    return id(attribute(module, name)[-1])


def memory_flags(place: int) -> list[str]:
    """What the kernel was told of the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if found := re.fullmatch("([0-9a-f]+)-([0-9a-f]+)", first):
            inside = int(found[1], 16) <= place < int(found[2], 16)
        elif inside and first == "VmFlags:":
            return rest.split()
    raise LookupError(hex(place))


def environment(name: str) -> str | None:
    return os.environ.get(name)


def loaded(module: str) -> bool:
    return module in sys.modules


def attribute(module: str, name: str) -> Any:
    """Read ``module.name`` without importing the module here."""
    return getattr(sys.modules[module], name)


def draw() -> float:
    """Draw from the interpreter's own generator (``random.random`` itself would bring its own)."""
    return random.random()


def oom_score() -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())


def descriptors() -> dict[int, str]:
    """Return the targets of this process's open descriptors."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue  # that of this listing
    return found


def descriptors_of_a_child(program: str = sys.executable) -> list[str]:
    """Return what a process started here inherits when nothing closes descriptors for it."""
    listing = "import os; print(*(os.readlink(f'/proc/self/fd/{n}') for n in range(3, 256) "
    listing += "if os.path.lexists(f'/proc/self/fd/{n}')), sep='\\n')"
    answer = subprocess.run(
        [program, "-I", "-c", listing],
        close_fds=False,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return answer.stdout.split()


def signals_of_a_child() -> tuple[int, int]:
    """Return the masks of the signals that a program started here blocks, and of those ignored."""
    answer = subprocess.run(
        ["cat", "/proc/self/status"], check=True, stdout=subprocess.PIPE, text=True
    )
    fields = dict(line.split(":", 1) for line in answer.stdout.splitlines())
    return int(fields["SigBlk"], 16), int(fields["SigIgn"], 16)


def run_program(script: str) -> int:
    return subprocess.run(["sh", "-c", script], check=False).returncode


def use_up_descriptors() -> int:
    """Open all there may be, and leave them open; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
    before = len(_opened)
    try:
        while True:
            _opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    return len(_opened) - before


_opened: list[int] = []


# --- initializers -----------------------------------------------------------------------------

initialized: list[tuple[Any, ...]] = []


def initialize(*values: Any) -> None:
    initialized.append(values)


def read_initialized() -> list[tuple[Any, ...]]:
    """Return the arguments of each time ``initialize`` ran in this worker."""
    return initialized


def meet_initialized(folder: Path, parties: int) -> list[tuple[Any, ...]]:
    """As ``read_initialized``, in ``parties`` workers at the same time."""
    meet(folder, parties)
    return initialized


def initialize_badly(text: str = "the initializer's own words") -> NoReturn:
    raise RuntimeError(text)


def initialize_and_log(text: str = "initializing") -> None:
    logging.getLogger("tests.initializer").warning(text)


def initialize_with_sys_exit() -> NoReturn:
    sys.exit("leaving early")


def initialize_with_os_exit() -> NoReturn:
    os._exit(17)


def initialize_for_ever(folder: Path) -> NoReturn:
    """Hang, having started something."""
    announce(folder / str(os.getpid()), str(start_sleep(own_session=True)))
    while True:
        signal.pause()


def initialize_until(path: Path) -> None:
    """Fail while ``path`` exists."""
    if path.exists():
        raise RuntimeError(f"{path.name} is still there")


def limit_memory(size: int) -> None:
    """Let this worker allocate about ``size`` bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def die_soon() -> None:
    """Let the worker die right after it has got ready."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Timer(0.05, die).start()


def die_receiving_a_call(mark: Path) -> None:
    """Let the kernel give this worker its first call, and kill it before it sees that.

    As where it is killed while it waits; only the first worker that finds no ``mark``.
    """
    from leasepool_django.backends.process.tray import LARGEST, TrayReader

    def die(tray: TrayReader) -> bytes:
        for end in tray.ends[:1]:
            end.read(LARGEST)
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    if not mark.exists():
        mark.touch()
        TrayReader.take = die  # type: ignore[assignment, method-assign]


def hang_up_receiving_a_call() -> None:
    """Shut the socket down between receiving a call and seeing it, and live on."""
    from leasepool_django.backends.process.records import forwarding
    from leasepool_django.backends.process.tray import LARGEST, TrayReader

    take = TrayReader.take

    def hesitate(tray: TrayReader) -> bytes:
        message = tray.ends[0].read(LARGEST) or b""
        assert forwarding.link is not None
        forwarding.link.channel.shutdown(socket.SHUT_RDWR)
        time.sleep(0.2)
        reads: list[Any] = tray._read
        reads[0] = lambda _: message
        return take(tray)

    TrayReader.take = hesitate  # type: ignore[assignment, method-assign]


def die_when_a_call_comes() -> None:
    """Let the worker be killed as soon as there is something to read for it, and before it reads.

    As where the kernel's out-of-memory killer ends each worker that wakes up.
    """
    from leasepool_django.backends.process.link import Link

    def die(link: Link) -> None:
        tray: list[Any] = [] if link.tray is None else link.tray.ends
        select.select([link.channel, *tray], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    Link.next_frame = die  # type: ignore[assignment, method-assign]


# --- logs -------------------------------------------------------------------------------------


def log(*texts: str, logger: str = "tests.worker", level: int = logging.INFO) -> int:
    for text in texts:
        logging.getLogger(logger).log(level, text)
    return os.getpid()


def log_many(count: int) -> int:
    logger = logging.getLogger("tests.worker")
    for number in range(count):
        logger.info("record %d", number)
    return count


def log_with_extras() -> None:
    logging.getLogger("tests.worker").info(
        "with %s", Unpicklable(), extra={"lock": threading.Lock(), "number": 7, "pair": (1, 2)}
    )


def log_and_raise() -> NoReturn:
    try:
        raise KeyError("inner")
    except KeyError:
        logging.getLogger("tests.worker").exception("it failed")
    raise ValueError("outer")


def log_from_signal_handler(count: int, size: int) -> int:
    """Log large records and, out of a signal handler, small ones; return how many of those."""
    logger = logging.getLogger("tests.worker")
    ticks = 0

    def tick(signum: int, frame: object) -> None:
        nonlocal ticks
        ticks += 1
        logger.info("tick")

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    for number in range(count):
        logger.info(f"{number % 10:x}" * size)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    return ticks


def log_and_die(text: str) -> None:
    logging.getLogger("tests.worker").info(text)
    kill_own_process()


def log_from_thread_later(path: Path) -> None:
    """Leave a thread that logs when ``path`` appears, after the call's end."""

    def later() -> None:
        wait_until(path.exists, timeout=20)
        logging.getLogger("tests.worker").info("from a thread left behind")

    threading.Thread(target=later, name="left-behind", daemon=True).start()


def handlers(logger: str | None = None) -> list[str]:
    """Return the names of the classes of a logger's own handlers."""
    return [type(handler).__name__ for handler in logging.getLogger(logger).handlers]


# --- crashes ----------------------------------------------------------------------------------


def exit_at_once(status: int = 3) -> NoReturn:
    os._exit(status)


def sys_exit(status: Any = 3) -> NoReturn:
    sys.exit(status)


def kill_own_process(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)
    # Only a signal that cannot be blocked ends the process before this.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def print_text(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - that is what it is for


def stop_fork_server_and_die() -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    kill_own_process()


def print_and_die(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    kill_own_process()


def segfault() -> None:
    # Where a fault handler writes its report: not among the test's own output.
    import faulthandler

    faulthandler.disable()
    ctypes.string_at(0)


def abort() -> NoReturn:
    import faulthandler

    faulthandler.disable()
    os.abort()


def stop_own_process(path: Path) -> None:
    announce(path, str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)


def eat_memory(size: int) -> int:
    return len(bytearray(size))


def recurse(depth: int = 0) -> int:
    return recurse(depth + 1) + 1


def mark_and_measure(path: Path, data: bytes) -> int:
    leave_mark(path)
    return len(data)


def mark_and_die(path: Path) -> NoReturn:
    leave_mark(path)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


# --- exceptions and results -------------------------------------------------------------------


class OddError(Exception):
    """Picklable as it is; carries more than its message."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code


class KeywordError(Exception):
    """Cannot be rebuilt by calling it with its args."""

    def __init__(self, *, field: str) -> None:
        super().__init__(f"bad {field}")
        self.field = field


class LockedError(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class ReduceRaisesError(Exception):
    def __reduce__(self) -> NoReturn:
        raise RuntimeError("no reduction")


class ReduceExitsError(Exception):
    def __reduce__(self) -> NoReturn:
        sys.exit(9)


class OwnBaseException(BaseException):
    """Derives from ``BaseException`` directly."""


def raise_odd() -> NoReturn:
    raise OddError("odd", 7)


def raise_large(size: int) -> NoReturn:
    raise ValueError("x" * size)


def raise_chained() -> NoReturn:
    try:
        _divide(1, 0)
    except ZeroDivisionError as error:
        raise OddError("could not divide", 8) from error
    raise AssertionError


def _divide(a: int, b: int) -> float:
    return a / b


def raise_named(name: str) -> NoReturn:
    """Raise what ``RAISED`` makes under this name."""
    exception = RAISED[name]()
    raise exception


RAISED: dict[str, Callable[[], BaseException]] = {
    "StopIteration": lambda: StopIteration("a value"),
    "StopAsyncIteration": lambda: StopAsyncIteration("no more"),
    "SystemExit": lambda: SystemExit(5),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": lambda: GeneratorExit("closing"),
    "CancelledError": lambda: asyncio.CancelledError("from a worker"),
    "OwnBaseException": lambda: OwnBaseException("base"),
    "BaseExceptionGroup": lambda: BaseExceptionGroup("all", [SystemExit(1), ValueError("v")]),
    "KeywordError": lambda: KeywordError(field="name"),
    "LockedError": LockedError,
    "ReduceRaisesError": lambda: ReduceRaisesError("r"),
    "ReduceExitsError": lambda: ReduceExitsError("r"),
    "LocalError": lambda: type("LocalError", (Exception,), {"__module__": __name__})("local"),
}


def raise_group() -> NoReturn:
    raise ExceptionGroup("several", [ValueError("one"), OddError("two", 2)])


class Unpicklable:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __repr__(self) -> str:
        return "<Unpicklable>"


class ExplodingPayload:
    """A large argument whose state cannot be taken over, for a reason that lies deeper."""

    def __init__(self, size: int) -> None:
        self.data = bytes(size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(len(state["data"]))


def check_state(size: int) -> NoReturn:
    raise ValueError(f"{size} bytes")


class ExplodingCarrier:
    """Something of the caller's context that cannot be taken over."""

    def capture(self) -> int:
        return 7

    def apply(self, value: int) -> None:
        check_state(value)


exploding_carrier = ExplodingCarrier()


class ExplodesOnArrival:
    """Pickled in the worker without trouble; unpickling it raises."""

    def __init__(self, exception: type[BaseException] = ValueError) -> None:
        self.exception = exception

    def __reduce__(self) -> tuple[Any, ...]:
        return (_explode, (self.exception,))


def _explode(exception: type[BaseException]) -> NoReturn:
    raise exception("on arrival")


def return_nested_lock() -> dict[str, Any]:
    return {"fine": 1, "client": Unpicklable()}


def return_lambda() -> Callable[[], int]:
    return lambda: 1


def return_exploding(exception: type[BaseException] = ValueError) -> ExplodesOnArrival:
    return ExplodesOnArrival(exception)


class SlowToArrive:
    """Unpickling it says so in ``path``, and waits for what the test does then."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.data = bytearray(size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.path, pickle.PickleBuffer(self.data))


def _arrive(path: Path, data: Any) -> int:
    announce(path)
    time.sleep(20)
    return len(data)


def return_slow(path: Path, size: int) -> SlowToArrive:
    return SlowToArrive(path, size)


class SlowToArriveError(Exception):
    """Where it was not raised, unpickling it says so in ``path``, and waits as above."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__(path, pid)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive_as_error, self.args


def _arrive_as_error(path: Path, pid: int) -> SlowToArriveError:
    if os.getpid() != pid:
        _arrive(path, b"")
    return SlowToArriveError(path, pid)


def raise_slow(path: Path) -> NoReturn:
    raise SlowToArriveError(path, os.getpid())


class ExitsWhenPickled:
    def __reduce__(self) -> NoReturn:
        sys.exit(4)


def return_exiting() -> ExitsWhenPickled:
    return ExitsWhenPickled()


# --- starting processes -----------------------------------------------------------------------


def start_sleep(*, own_session: bool = False) -> int:
    """Start a program that outlives everything unless it is killed; return its pid."""
    program = subprocess.Popen(["sleep", SLEEP], start_new_session=own_session)
    _programs.append(program)  # else it would be warned about when it becomes garbage
    return program.pid


_programs: list[subprocess.Popen[bytes]] = []


def start_as_root() -> tuple[int, int]:
    """Start a program as root, which this worker may be for as long as it takes; return pids."""
    user = os.getuid()
    os.setresuid(0, 0, 0)
    try:
        return os.getpid(), start_sleep(own_session=True)
    finally:
        os.setresuid(user, user, 0)


def start_double_forked() -> int:
    """Start one whose parent ends at once, in a session of its own, as daemons do."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        grandchild = os.fork()
        if grandchild:
            os.write(writer, str(grandchild).encode())
            os._exit(0)
        os.close(writer)
        os.execvp("sleep", ["sleep", SLEEP])
    os.close(writer)
    os.waitpid(child, 0)
    answer = os.read(reader, 100)
    os.close(reader)
    return int(answer)


def start_all_kinds() -> list[int]:
    """Start programs in every way that might escape; return their pids."""
    shell = subprocess.Popen(["sh", "-c", f"sleep {SLEEP} & echo $!; wait"], stdout=subprocess.PIPE)
    assert shell.stdout is not None
    return [
        start_sleep(),
        start_sleep(own_session=True),
        start_double_forked(),
        shell.pid,
        int(shell.stdout.readline()),
    ]


def start_and_spin(path: Path) -> NoReturn:
    """Start programs, write their pids (the worker's first) into ``path``, and use the core."""
    announce(path, " ".join(map(str, [os.getpid(), *start_all_kinds()])))
    while True:
        pass


def start_and_return() -> list[int]:
    return [os.getpid(), *start_all_kinds()]


def pass_socket_on_and_die(path: Path, status: int | None = 3) -> None:
    """Let a program keep this worker's own socket open, and die; ``None``: return instead."""
    sockets = [number for number, target in descriptors().items() if target.startswith("socket:")]
    keeper = subprocess.Popen(["sleep", SLEEP], pass_fds=sockets, start_new_session=True)
    announce(path, f"{os.getpid()} {keeper.pid} {len(sockets)}")
    if status is not None:
        os._exit(status)


# --- hostile ----------------------------------------------------------------------------------


def close_everything() -> str:
    os.closerange(0, 1 << 16)
    return "closed"


def close_everything_and_linger(path: Path) -> NoReturn:
    os.closerange(0, 1 << 16)
    announce(path)
    while True:
        signal.pause()


def close_everything_and_write(path: Path) -> str:
    """Get the number of the worker's socket for a file of one's own."""
    os.closerange(0, 1 << 16)
    files = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(32)]
    assert files
    return "a result that must not land in the file"


def change_directory(where: str) -> str:
    os.chdir(where)
    return os.getcwd()  # noqa: PTH109 - text


def change_signal_handlers() -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())


def leave_thread() -> int:
    """Leave a thread that never ends and does not let the interpreter end either."""
    threading.Thread(target=threading.Event().wait, name="left-behind").start()
    return os.getpid()


class NoStream:
    """Stands for standard output and can do nothing."""


def replace_streams() -> None:
    sys.stdout = sys.stderr = NoStream()


class ExplodingStream:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> NoReturn:
        raise RuntimeError("flushing is not allowed")


def replace_streams_badly() -> int:
    sys.stdout = sys.stderr = ExplodingStream()
    return os.getpid()


def read_stdin() -> str:
    return sys.stdin.read()


def fork_and_return(path: Path) -> int:
    """Return twice: in the worker, and in a child of it."""
    child = os.fork()
    if not child:
        announce(path, str(os.getpid()))
    return os.getpid()


def fork_and_raise(path: Path) -> int:
    """As ``fork_and_return``; the child leaves by an exception."""
    child = os.fork()
    if not child:
        announce(path, str(os.getpid()))
        raise RuntimeError("in the child")
    os.waitpid(child, 0)
    return os.getpid()


def fork_and_log(path: Path) -> int:
    """Let a child log: it has no line to the parent."""
    child = os.fork()
    if not child:
        logging.getLogger("tests.worker").info("from a child")
        announce(path)
        os._exit(0)
    os.waitpid(child, 0)
    return os.getpid()


def write_into_own_socket() -> str:
    """Send rubbish to the parent."""

    for number, target in descriptors().items():
        if target.startswith("socket:"):
            stray = socket.socket(fileno=number)
            stray.send(b"\x01\x01\x00\x00\x00\x00\x00\x00x")
            stray.detach()
    return "rubbish sent"


def interfere_later(go: Path) -> int:
    """Leave a thread that writes into the worker's own socket when ``go`` appears."""

    def interfere() -> None:
        wait_until(go.exists, timeout=20)
        for number, target in descriptors().items():
            if target.startswith("socket:"):
                os.write(number, b"Hello, this is no frame\n")

    threading.Thread(target=interfere, daemon=True).start()
    return os.getpid()


def leave_group() -> int:
    """Join another process group, and start something in the old one."""
    start_sleep()
    os.setpgid(0, os.getpgid(os.getppid()))
    return os.getpgid(0)


# --- contexts ---------------------------------------------------------------------------------

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


def swap_context_value(value: str) -> str:
    """Set the variable here and return what it was before."""
    before = request_id.get()
    request_id.set(value)
    return before


# --- functions that must be refused -----------------------------------------------------------


async def coroutine() -> None:
    """Cannot run in a worker."""


def generator() -> Iterator[None]:
    """Cannot run in a worker either."""
    yield


async def async_generator() -> AsyncIterator[None]:
    """Nor can this one."""
    yield


partial_generator = functools.partial(generator)


@functools.wraps(generator)
def wrapped_generator() -> Iterator[None]:
    return generator()


class Generating:
    def __call__(self) -> Iterator[None]:
        yield


generating = Generating()


@contextlib.contextmanager
def managing() -> Iterator[None]:
    yield


@contextlib.asynccontextmanager
async def managing_async() -> AsyncIterator[None]:
    yield


def give_a_context_manager() -> contextlib.AbstractContextManager[None]:
    """Can: its body has run."""
    return managing()


@functools.wraps(managing)
def enter_a_context_manager() -> contextlib.AbstractContextManager[None]:
    """Can: it has begun the body."""
    manager = managing()
    manager.__enter__()
    return manager


class Odd:
    """A context manager of somebody's own."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> NoReturn:
        raise KeyError(name)


def give_an_odd_one() -> Odd:
    """Can: nobody looks into it."""
    return Odd()


def give_a_generator() -> Iterator[int]:
    """Can: whatever it returns, its body has run."""
    return (number for number in range(3))


class Client:
    """What libraries call a client: it holds a pool of connections, which holds a lock."""

    def __init__(self) -> None:
        self.pool = ConnectionPool()

    def fetch(self) -> str:
        return "fetched"


class ConnectionPool:
    def __init__(self) -> None:
        self.lock = threading.Lock()


class Greeter:
    """Its bound methods can travel."""

    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    def greet(self, name: str) -> str:
        return f"{self.greeting}, {name}"


@functools.lru_cache
def cached(value: int) -> int:
    time.sleep(0)
    return value * 2


def mark_number(path: Path, number: int) -> int:
    """Add ``number`` to ``path``, in one piece, and return it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, b"%d\n" % number)
    os.close(descriptor)
    return number


def mark_number_and_work(path: Path, number: int) -> int:
    """Go on for a few tenths of a millisecond after that."""
    mark_number(path, number)
    deadline = time.perf_counter() + 0.0003
    while time.perf_counter() < deadline:
        pass
    return number


def shrink_tray() -> list[str]:
    """Try to cut off the memory that this worker and the server count calls in; what was said."""
    said = []
    for number, target in descriptors().items():
        if "worker-tray" in target:
            try:
                os.ftruncate(number, 0)
                said.append("done")
            except OSError as error:
                said.append(type(error).__name__)
    return said


def descriptors_of_a_fork() -> list[str]:
    """Return what a process that this worker forks has open, apart from its standard streams."""
    reading, writing = os.pipe()
    if not os.fork():
        found = [target for number, target in descriptors().items() if number > 2]
        os.write(writing, "\n".join(found).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:  # noqa: PTH123
        return pipe.read().split("\n")


def fill_tray() -> None:
    """Write what is no call to every pipe that this worker reads from."""
    for number, target in descriptors().items():
        if number > 2 and target.startswith("pipe:"):
            path = f"/proc/self/fd/{number}"
            with FileIO(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "w") as pipe:
                fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
                pipe.write(b"nonsense")
