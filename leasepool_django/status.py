"""What the pools of this project's running processes are doing, for ``manage.py leasepool status``.

A process whose pools are in use listens on a socket in Linux's abstract namespace, which is no
file, is found in ``/proc/net/unix``, and is gone with the process, however that ends. Whoever
connects is sent one JSON object and nothing else can be asked for. The kernel says who that is
(``SO_PEERCRED``, unix(7)): only the process's own user and root are answered. What is answered is
believed as far as it has the right form, for any user can listen under such a name.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .engine import AT_REST, LeaseStats, ManagerStats, PoolStats, WorkerStats

__all__ = ["Answer", "Publisher", "ask_all", "publish", "supported"]

T = TypeVar("T")

_NAME = "leasepool-django"
_TOKEN_BYTES = 8
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
_ANSWER_SECONDS = 2.0  # for all to be asked and to answer; and for one to read what it is sent
_MAX_ANSWER_BYTES = 1 << 20
_MAX_FOREIGN_BYTES = 1 << 16  # from a user who is neither the asker nor root
_MAX_ASKED = 256  # processes; those of the asker and of root first
_REFUSED_SECONDS = 0.01  # of rest after one who may not ask
_SOCKETS = Path("/proc/net/unix")
_ROOT = 0
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
        self._connection: socket.socket | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _publishers.add(self)
        try:
            self._socket.bind(f"\0{_prefix(project)}{secrets.token_hex(_TOKEN_BYTES)}")
            self._socket.listen()
            threading.Thread(target=self._serve, name="leasepool-status", daemon=True).start()
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Answer nobody any more; the thread ends by itself. Any thread."""
        with suppress(OSError):  # a second time
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends accept()

    def discard(self) -> None:
        """In a forked child, which has no such thread: close the copies of the sockets."""
        self._socket.close()
        if self._connection is not None:
            self._connection.close()

    def _end(self) -> None:
        self._socket.close()
        _publishers.discard(self)

    def _serve(self) -> None:
        try:
            while True:
                try:
                    self._connection, _ = self._socket.accept()
                except OSError as error:
                    if error.errno not in _PASSING:
                        return  # closed
                    time.sleep(_ANSWER_SECONDS)  # nothing tells when there are descriptors again
                    continue
                with self._connection as connection:
                    try:
                        self._answer(connection)
                    except OSError:
                        continue  # whoever asked has left, or does not read
                    except Exception:
                        logger.exception("leasepool status: this process cannot tell its state.")
                    finally:
                        self._connection = None
        finally:
            self._end()

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER_SECONDS)
        _, uid = _peer(connection)
        if uid not in {os.geteuid(), _ROOT}:
            time.sleep(_REFUSED_SECONDS)  # a flood of these must not cost the server its cores
            return
        managers = self._managers()
        if all(stats.state in AT_REST for stats in managers.values()):
            return  # nothing is in use, though nobody has said so yet
        content = {
            "command": _command(),
            "directory": _directory(),
            "age": time.monotonic() - self._began,
            "pools": {alias: dataclasses.asdict(stats) for alias, stats in managers.items()},
        }
        connection.sendall(json.dumps(content, default=str).encode())
        # The end, also where a child that was forked meanwhile has a copy of the connection.
        connection.shutdown(socket.SHUT_WR)


_publishers: set[Publisher] = set()


def _after_fork_in_child() -> None:
    for publisher in list(_publishers):
        publisher.discard()
    _publishers.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)


def publish(
    managers: Callable[[], Mapping[str, ManagerStats]], project: str
) -> tuple[Publisher | None, str]:
    """Begin to answer; without a publisher, why not, if one could have been expected."""
    if not supported():
        return None, ""
    try:
        return Publisher(managers, project), ""
    except (OSError, RuntimeError) as error:  # RuntimeError: there can be no more threads
        return None, f"{type(error).__name__}: {error}"


# -- asking ----------------------------------------------------------------------------------------


class _Asked:
    """One connection, and what has come by it."""

    def __init__(self, connection: socket.socket, pid: int, uid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.uid = uid
        self.own = uid in {os.geteuid(), _ROOT}
        self.received = bytearray()
        self.ended = False
        self.trouble = ""

    def receive(self) -> bool:
        """Receive once; whether more may come."""
        try:
            part = self.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            part = b""
        if not part:
            self.ended = True
            return False
        self.received += part
        if len(self.received) > (_MAX_ANSWER_BYTES if self.own else _MAX_FOREIGN_BYTES):
            self.trouble = "says more than it could have to say"
            return False
        return True

    def answer(self) -> Answer | None:
        """What came of it; ``None`` if it has ended, or has no pool in use."""
        user = _user_name(self.uid)
        if not self.trouble and not self.ended:
            self.trouble = f"did not answer within {_ANSWER_SECONDS:g} s"
        if not self.trouble and not self.received:
            if os.geteuid() in {self.uid, _ROOT}:
                return None
            self.trouble = "tells only its own user and root"
        if not self.trouble:
            try:
                return _read(self.pid, user, bytes(self.received))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                self.trouble = "tells its state as another version of leasepool-django does"
        return Answer(self.pid, user, trouble=self.trouble)


def ask_all(project: str) -> list[Answer]:
    """Ask every process with the settings module ``project``, in the order of their pids.

    Takes two seconds if one does not answer, however many these are. ``OSError`` if the system does
    not say which there are.
    """
    answers: list[Answer] = []
    with ExitStack() as opened:
        asked: list[_Asked] = []
        for name in _names(project):
            connection = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connection.setblocking(False)
            try:
                connection.connect(f"\0{name}")
                pid, uid = _peer(connection)
            except ConnectionRefusedError:
                continue  # it has ended
            except BlockingIOError:
                answers.append(Answer(0, "", trouble="does not answer, since too many ask"))
                continue
            except OSError as error:
                answers.append(Answer(0, "", trouble=f"cannot be asked: {error}"))
                continue
            if os.geteuid() in {uid, _ROOT} or uid == _ROOT:
                asked.append(_Asked(connection, pid, uid))
            else:
                trouble = "tells only its own user and root"
                answers.append(Answer(pid, _user_name(uid), trouble=trouble))
        asked.sort(key=lambda one: not one.own)
        for one in asked[_MAX_ASKED:]:
            one.trouble = f"was not asked: there are more than {_MAX_ASKED}"
        _receive_all(asked[:_MAX_ASKED])
        answers += [found for one in asked if (found := one.answer()) is not None]
    return sorted(answers, key=lambda answer: (answer.pid, answer.command))


def _names(project: str) -> Iterator[str]:
    prefix = re.escape(_prefix(project))
    pattern = re.compile(rf" @({prefix}[0-9a-f]{{{2 * _TOKEN_BYTES}}})$", re.MULTILINE)
    # A listening socket is there once, and once more for each connection that it has accepted.
    return iter({found[1] for found in pattern.finditer(_SOCKETS.read_text(errors="replace"))})


def _receive_all(asked: list[_Asked]) -> None:
    """Let them answer, within ``_ANSWER_SECONDS`` in all."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    with selectors.DefaultSelector() as selector:
        for one in asked:
            selector.register(one.connection, selectors.EVENT_READ, one)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if not key.data.receive():
                    selector.unregister(key.fileobj)


def _read(pid: int, user: str, received: bytes) -> Answer:
    content = json.loads(received)
    pools = {}
    for alias, stats in content["pools"].items():
        lists = [
            PoolStats(
                _checked("int", pool["number"]),
                tuple(_made(WorkerStats, worker) for worker in pool["workers"]),
            )
            for pool in stats.pop("pools")
        ]
        leases = tuple(_made(LeaseStats, lease) for lease in stats.pop("leases"))
        pools[str(alias)] = _made(ManagerStats, stats, pools=tuple(lists), leases=leases)
    return Answer(
        pid,
        user,
        command=_checked("str", content["command"]),
        directory=_checked("str", content["directory"]),
        age=_checked("float", content["age"]),
        pools=pools,
    )


def _made(kind: type[T], content: dict[str, Any], **known: Any) -> T:
    """Make one of the snapshots of what JSON says; an error if it has another form."""
    types = {one.name: one.type for one in dataclasses.fields(kind) if one.name not in known}  # type: ignore[arg-type]
    if content.keys() != types.keys():
        raise ValueError(f"{kind.__name__} has other fields here")
    checked = {name: _checked(str(types[name]), value) for name, value in content.items()}
    return kind(**checked, **known)


def _checked(kind: str, value: Any) -> Any:
    """Return ``value`` if it is of the type that ``kind`` is the annotation of."""
    if value is None and kind.endswith(" | None"):
        return None
    match kind.removesuffix(" | None"), value:
        case "str", str():
            return value
        case "int", int() if not isinstance(value, bool) and abs(value) < 1 << 63:
            return value
        case "float", int() | float() if abs(value) < 1 << 63:  # which NaN is not
            return float(value)
    raise ValueError(f"is no {kind}")


def _peer(connection: socket.socket) -> tuple[int, int]:
    """The pid and the uid of the process at the other end, as of when it listened or connected."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


def _user_name(uid: int) -> str:
    import pwd  # not on Windows

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _prefix(project: str) -> str:
    """Not the project's own name, which is nobody else's business."""
    return f"{_NAME}/{hashlib.sha256(project.encode()).hexdigest()[:16]}/"


def _command() -> str:
    """What this process is, without the arguments of it that may be anything.

    ``uvicorn shop.asgi:application``, ``manage.py leasepool map shop.scoring.score``.
    """
    program, *arguments = sys.argv or [""]
    path = Path(program)
    name = path.parent.name if path.name == "__main__.py" else path.name
    words: list[str] = []
    if name in {"manage.py", "django-admin"}:
        words = arguments[:1]
        if words == ["leasepool"]:
            words = arguments[:3]
    elif arguments and _APPLICATION.fullmatch(arguments[0]):
        words = arguments[:1]
    told: list[str] = []
    for word in words:
        if not _NAMES.fullmatch(word) or (len(told) == 2 and "." not in word):
            break
        told.append(word)
    return " ".join([name, *told])


_APPLICATION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_NAMES = re.compile(r"[A-Za-z_][\w.:-]*")


def _directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return ""  # it has been removed
