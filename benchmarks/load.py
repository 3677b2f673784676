"""A load generator: keep-alive connections that ask for a page and count the answer's bytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import cast

__all__ = ["Connection", "connect", "paced", "saturate"]


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time. Every response must give its length."""

    def __init__(self) -> None:
        self._received = b""
        self._answer: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, no check: uvloop's transports are not asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, gap, body = self._received.partition(b"\r\n\r\n")
        if not gap:
            return
        if len(body) < _length(head):
            return
        self._received = b""
        status = head.split(b" ", 2)[1]
        answer, self._answer = self._answer, None
        if answer is None or answer.done():
            return
        if status == b"200":
            answer.set_result(None)
        else:
            answer.set_exception(RuntimeError(f"the server answered {status.decode()}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server hung up"))

    def get(self, path: str) -> asyncio.Future[None]:
        """Ask for ``path``; the future is done when its answer has come whole."""
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        return answer

    def close(self) -> None:
        """Hang up."""
        self._transport.close()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    raise RuntimeError("a response without Content-Length")


async def connect(port: int) -> Connection:
    """A connection to ``port`` on this machine."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    return connection


async def saturate(connection: Connection, paths: Iterator[str], end: float) -> int:
    """Ask for one page after the other until ``end`` (``time.perf_counter()``); how many came."""
    count = 0
    for path in paths:
        if time.perf_counter() >= end:
            break
        await connection.get(path)
        count += 1
    return count


async def paced(
    connections: Sequence[Connection], path: str, interval: float, end: float
) -> list[float]:
    """Ask for ``path`` every ``interval`` seconds until ``end``; the seconds each answer took.

    As independent visitors do: each request is made when it is due, on a connection of its own,
    however late the answers before it are. Where none of ``connections`` is free, its time counts
    from when it was due all the same.
    """
    clock = time.perf_counter
    durations: list[float] = []
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for connection in connections:
        free.put_nowait(connection)

    async def ask(due: float) -> None:
        connection = await free.get()
        await connection.get(path)
        durations.append(clock() - due)
        free.put_nowait(connection)

    due = clock()
    async with asyncio.TaskGroup() as visitors:
        while due < end:
            await asyncio.sleep(due - clock())
            visitors.create_task(ask(due))
            due += interval
    return durations
