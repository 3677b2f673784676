"""A real server in a process of its own: starting, asking, signalling and looking at what is left.

Every process of a server, its workers included, carries the server's mark in its environment;
that is how they are found, and only those are ever signalled.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.waiting import wait_until

from .kinds import Kind

__all__ = ["Answer", "Server", "serving"]

ROOT = Path(__file__).resolve().parents[2]
PROC = Path("/proc")
FORK_SERVER = b"leasepool_django.backends.process.forkserver"
# What the test run asks of its own interpreter, and what a server must not inherit from it.
NOT_FOR_SERVERS = {"PYTHONDEVMODE", "PYTHONWARNINGS", "PYTHONASYNCIODEBUG"}


@dataclass(frozen=True)
class Answer:
    """What a client got. ``status`` is 0 when the connection ended without an answer."""

    status: int
    body: dict[str, Any]


class Server:
    """One server and its processes. ``folder`` is its own; ``port`` is on loopback."""

    def __init__(self, kind: Kind, folder: Path, clients: ThreadPoolExecutor) -> None:
        self.kind = kind
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.port = free_port()
        self._clients = clients
        self._log = folder / "output.log"
        self._process: subprocess.Popen[bytes]

    def launch(self, **environment: str) -> None:
        """Start the process; ``environment`` is added to that of the tests."""
        (self.folder / "touched.py").write_text(
            '"""Touched by a test, to make servers reload."""\n'
        )
        inherited = {k: v for k, v in os.environ.items() if k not in NOT_FOR_SERVERS}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.kind.command(port=self.port, folder=self.folder),
                cwd=ROOT,
                env={
                    **inherited,
                    "DJANGO_SETTINGS_MODULE": "tests.servers.settings",
                    "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder)]),
                    "PYTHONUNBUFFERED": "1",
                    "SERVERS_MARK": self.mark,
                    "SERVERS_TOUCHED": "touched",
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C goes to the whole group.
                process_group=0,
            )

    def wait_ready(self) -> None:
        """Until it answers, and where pools start with the server, all of them have started."""
        wait_until(self._answers, timeout=30, message=self.output)
        if self.kind.lifespan:
            wait_until(
                lambda: len(self.workers()) == 2 * self.kind.processes,
                timeout=30,
                message=self.output,
            )

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.output()
        return self.get("/alive").body.get("mark") == self.mark

    # -- asking ------------------------------------------------------------------------------------

    def get(self, path: str, **query: object) -> Answer:
        """Ask for ``path``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", _with_query(path, query))
            response = connection.getresponse()
            text = response.read().decode()
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException):
            return Answer(0, {})
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return Answer(response.status, json.loads(text) if is_json and text else {"text": text})

    def ask(self, path: str, **query: object) -> Future[Answer]:
        """Ask for ``path`` while the test goes on."""
        return self._clients.submit(partial(self.get, path, **query))

    @contextmanager
    def asking(self, path: str, **query: object) -> Iterator[None]:
        """Ask for ``path``, and close the connection at the end of the block."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            target = _with_query(path, query)
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            yield

    def file(self) -> Path:
        """A name for a file in which a function leaves its worker's process id."""
        return self.folder / uuid.uuid4().hex

    def running(self, file: Path) -> int:
        """Wait until the function that leaves ``file`` runs; its worker's process id."""
        wait_until(file.exists, timeout=20, message=self.output)
        return int(file.read_text())

    # -- looking -----------------------------------------------------------------------------------

    def output(self) -> str:
        """Everything the server's processes have printed."""
        return self._log.read_text(errors="replace")

    def processes(self) -> set[int]:
        """All its living processes: servers, fork servers, workers."""
        mark = f"SERVERS_MARK={self.mark}".encode()
        found = set()
        for entry in PROC.glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
        return found

    def fork_servers(self) -> set[int]:
        """The fork servers: one for each server process whose pool runs."""
        pool = self.pool_processes()
        return {pid for pid in pool if parent(pid) not in pool}

    def workers(self) -> set[int]:
        """The workers."""
        pool = self.pool_processes()
        return {pid for pid in pool if parent(pid) in pool}

    def pool_processes(self) -> set[int]:
        """Workers and fork servers."""
        found = set()
        for pid in self.processes():
            with suppress(FileNotFoundError, ProcessLookupError):
                if FORK_SERVER in (PROC / str(pid) / "cmdline").read_bytes().split(b"\0"):
                    found.add(pid)
        return found

    def exists(self, pid: int) -> bool:
        """Whether this process of the server lives (a zombie does not)."""
        return pid in self.processes()

    def port_is_free(self) -> bool:
        """Whether nobody listens any more."""
        with socket.socket() as probe:
            # Connections that clients have left stay for a while; listeners do not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError:
                return False
        return True

    # -- ending ------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """SIGTERM to the main process, as ``docker stop`` and ``kill`` do."""
        self._process.send_signal(signal.SIGTERM)

    def terminate_all(self) -> None:
        """SIGTERM to every process of the service at once, as systemd does by default.

        A server that does not bear a second signal gets it once, from its main process.
        """
        spared = self._children() if self.kind.hangs else set()
        for pid in self.processes() - spared:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def interrupt(self) -> None:
        """SIGINT to the process group, as Ctrl-C does; limited as in ``terminate_all``."""
        if self.kind.hangs:
            self._process.send_signal(signal.SIGINT)
        else:
            os.killpg(self._process.pid, signal.SIGINT)

    def _children(self) -> set[int]:
        """The server processes that its main process has started."""
        servers = self.processes() - self.pool_processes()
        return {pid for pid in servers if parent(pid) == self._process.pid}

    def kill_servers(self) -> set[int]:
        """SIGKILL to each server process that has a pool; the pools' processes at that moment."""
        pool = self.pool_processes()
        for pid in {parent(pid) for pid in self.fork_servers()}:
            assert pid in self.processes()
            os.kill(pid, signal.SIGKILL)
        return pool

    def wait_end(self, timeout: float = 20) -> int:
        """Wait until the server has ended by itself; its exit status.

        Nothing may be left of it a second later: no process, and nobody who listens.
        """
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {timeout:g} s:\n{self.output()}") from None
        wait_until(
            lambda: not self.processes(),
            timeout=1,
            message=lambda: f"left behind: {self.processes()}\n{self.output()}",
        )
        wait_until(self.port_is_free, timeout=1, message="somebody still listens")
        return status

    def destroy(self) -> None:
        """Kill whatever is left."""
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait(10)


@contextmanager
def serving(
    kind: Kind, folder: Path, *environments: dict[str, str]
) -> Iterator[tuple[Server, ...]]:
    """Run one server for each of ``environments``, all launched at once; none is ready yet."""
    with ThreadPoolExecutor(8) as clients:
        servers: list[Server] = []
        try:
            for number, environment in enumerate(environments or ({},)):
                own = folder / str(number)
                own.mkdir()
                server = Server(kind, own, clients)
                servers.append(server)
                server.launch(**environment)
            yield tuple(servers)
        except BaseException as error:
            for server in servers:
                error.add_note(f"Output of {kind.name}:\n{server.output()}")
            raise
        finally:
            for server in servers:
                server.destroy()


def parent(pid: int) -> int:
    """The process id of the parent; 0 if the process is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[1])
    return 0


def free_port() -> int:
    """A loopback port on which nobody listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _with_query(path: str, query: dict[str, object]) -> str:
    return f"{path}?{urlencode(query)}" if query else path
