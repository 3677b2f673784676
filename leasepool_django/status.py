"""What the pools of this project's running processes are doing, for ``manage.py leasepool status``.

A process whose pools are in use listens on a socket in Linux's abstract namespace, which is no
file, is found in ``/proc/net/unix``, and is gone with the process, however that ends. Whoever
connects is sent one JSON object and nothing else can be asked for. The kernel says who that is
(``SO_PEERCRED``, unix(7)): only the process's own user and root are answered.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .engine import LeaseStats, ManagerStats, PoolStats, WorkerStats

__all__ = ["Answer", "Publisher", "ask_all", "publish", "supported"]

_NAME = "leasepool-django"
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
_ANSWER_SECONDS = 2.0  # for what is sent or received
_MAX_ANSWER_BYTES = 16 << 20
_AT_ONCE = 16  # processes that are asked
_SOCKETS = Path("/proc/net/unix")
_ROOT = 0
_MAX_COMMAND_CHARS = 200
# What accept() may fail with for a while: whoever asked has left, or descriptors are short.
_PASSING = {errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What one process said, or in ``trouble`` why it said nothing.

    ``pid`` is 0 for a process that cannot be seen from here, as one of another container;
    ``user`` is the name of its user. ``command`` and ``directory``: what was started, and where it
    is now. ``age``: seconds since its pools were first used. ``pools``: alias → snapshot.
    """

    pid: int
    user: str
    command: str = ""
    directory: str = ""
    age: float = 0.0
    pools: Mapping[str, ManagerStats] = field(default_factory=dict)
    trouble: str = ""


def supported() -> bool:
    """Whether processes can publish, and be asked for, their state on this platform."""
    return sys.platform == "linux"


class Publisher:
    """Answers whoever may ask about this process, on a thread of its own.

    ``managers``: called for each answer, gives alias → snapshot. ``project``: the name of the
    settings module. ``OSError`` or ``RuntimeError`` if there can be no such socket or thread.
    """

    def __init__(self, managers: Callable[[], Mapping[str, ManagerStats]], project: str) -> None:
        self._managers = managers
        self._began = time.monotonic()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(f"\0{_prefix(project)}{secrets.token_hex(8)}")
            self._socket.listen()
            threading.Thread(target=self._serve, name="leasepool-status", daemon=True).start()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Answer nobody any more; the thread ends by itself. Any thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends accept()
        except OSError:
            return  # a second time

    def discard(self) -> None:
        """In a forked child, which has no such thread: close the copy of the socket."""
        self._socket.close()

    def _serve(self) -> None:
        with self._socket:
            while True:
                try:
                    connection, _ = self._socket.accept()
                except OSError as error:
                    if error.errno not in _PASSING:
                        return  # closed
                    time.sleep(_ANSWER_SECONDS)  # nothing tells when there are descriptors again
                    continue
                with connection:
                    try:
                        self._answer(connection)
                    except OSError:
                        continue  # whoever asked has left, or does not read
                    except Exception:
                        logger.exception("leasepool status: this process cannot tell its state.")

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER_SECONDS)
        _, uid = _peer(connection)
        if uid not in {os.geteuid(), _ROOT}:
            return
        content = {
            "command": _command(),
            "directory": _directory(),
            "age": time.monotonic() - self._began,
            "pools": {
                alias: dataclasses.asdict(stats) for alias, stats in self._managers().items()
            },
        }
        connection.sendall(json.dumps(content, default=str).encode())


def publish(managers: Callable[[], Mapping[str, ManagerStats]], project: str) -> Publisher | None:
    """Begin to answer; ``None``, with a warning where one can be expected to be of use, if not."""
    if not supported():
        return None
    try:
        return Publisher(managers, project)
    except (OSError, RuntimeError) as error:  # RuntimeError: there can be no more threads
        logger.warning(
            "manage.py leasepool status will not show this process: %s: %s. Where it need not, "
            "set PUBLISH_STATUS to False.",
            type(error).__name__,
            error,
        )
        return None


def ask_all(project: str) -> list[Answer]:
    """Ask every process with the settings module ``project``, in the order of their pids.

    Takes two seconds if one does not answer. ``OSError`` if the system does not say which there
    are.
    """
    prefix = f"@{_prefix(project)}"
    listed = _SOCKETS.read_text(errors="replace").splitlines()
    # A listening socket is there once, and once more for each connection that it has accepted.
    names = {name for line in listed if (name := line.rpartition(" ")[2]).startswith(prefix)}
    if not names:
        return []
    with ThreadPoolExecutor(min(_AT_ONCE, len(names)), "leasepool-ask") as threads:
        answers = threads.map(_ask, names)
        found = [answer for answer in answers if answer is not None]
    return sorted(found, key=lambda answer: (answer.pid, answer.command))


def _ask(name: str) -> Answer | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ANSWER_SECONDS)
        try:
            connection.connect("\0" + name.removeprefix("@"))
        except BlockingIOError:
            return Answer(0, "", trouble="does not answer, since too many ask")
        except ConnectionRefusedError:
            return None  # it has ended
        pid, uid = _peer(connection)
        user = _user_name(uid)
        if os.geteuid() not in {uid, _ROOT}:
            return Answer(pid, user, trouble="tells only its own user and root")
        try:
            received = _receive(connection)
        except TimeoutError:
            return Answer(pid, user, trouble=f"did not answer within {_ANSWER_SECONDS:g} s")
        except ConnectionError:
            return None
    if not received:
        return None  # it has ended
    try:
        return _read(pid, user, received)
    except (ValueError, LookupError, TypeError, AttributeError):
        return Answer(
            pid, user, trouble="tells its state as another version of leasepool-django does"
        )


def _read(pid: int, user: str, received: bytes) -> Answer:
    content = json.loads(received)
    pools = {
        str(alias): ManagerStats(
            **{
                **stats,
                "pools": tuple(
                    PoolStats(pool["number"], tuple(WorkerStats(**one) for one in pool["workers"]))
                    for pool in stats["pools"]
                ),
                "leases": tuple(LeaseStats(**lease) for lease in stats["leases"]),
            }
        )
        for alias, stats in content["pools"].items()
    }
    command, directory = str(content["command"]), str(content["directory"])
    return Answer(pid, user, command, directory, float(content["age"]), pools)


def _user_name(uid: int) -> str:
    import pwd  # not on Windows

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _receive(connection: socket.socket) -> bytes:
    """Read to the end, for ``_ANSWER_SECONDS`` in all; ``TimeoutError`` if it does not come."""
    received = bytearray()
    deadline = time.monotonic() + _ANSWER_SECONDS
    while len(received) <= _MAX_ANSWER_BYTES:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        part = connection.recv(1 << 16)
        if not part:
            return bytes(received)
        received += part
    raise TimeoutError


def _peer(connection: socket.socket) -> tuple[int, int]:
    """The pid and the uid of the process at the other end, as of when it listened or connected."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


def _prefix(project: str) -> str:
    """Not the project's own name, which is nobody else's business."""
    return f"{_NAME}/{hashlib.sha256(project.encode()).hexdigest()[:16]}/"


def _command() -> str:
    """How this process was started, without the interpreter and without paths."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    name = path.parent.name if path.name == "__main__.py" else path.name
    return " ".join([name, *arguments])[:_MAX_COMMAND_CHARS]


def _directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return ""  # it has been removed
