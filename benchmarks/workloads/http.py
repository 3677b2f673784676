"""A Django view that computes 1 to 5 ms in a worker, through uvicorn, beside a light view."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO

from .. import load
from ..contenders import OURS, Contender, Wanted, make
from ..measuring import Better, Effort, Metric, NotMeasuredError, percentile, run_async
from ..reasons import of_error, of_output
from .group import PEERS, Figures, Group

CLIENTS = 32
VISITORS = 16
LIGHT_INTERVAL = 0.02
PATIENCE = 30.0  # seconds for the server to start, and to end


class Http(Group):
    """One uvicorn process, 32 clients."""

    name = "http"
    title = "HTTP through uvicorn, 32 clients, 1–5 ms of CPU a request"
    work = (
        "A Django view awaits a call of 1 to 5 ms of CPU time (the same sequence for all) in one "
        "worker for each core; 32 keep-alive clients ask without pause. Meanwhile others ask for a "
        "view that computes nothing, one every 20 ms, whether or not the answers before have come; "
        "its time counts from when it was due. The clients share the machine; they run at a higher "
        "priority where that is allowed, as if they were elsewhere."
    )
    metrics = (
        Metric("requests", "requests a second", "/s", Better.HIGHER),
        Metric("light_p50", "light view, median", "ms"),
        Metric("light_p99", "light view, p99", "ms"),
    )
    contenders = ("django", "django-nice-0", *PEERS)

    def wanted(self) -> Wanted:
        return Wanted()

    def cell(self, contender: str, loop: str, effort: Effort) -> Figures:
        if contender not in OURS:
            make(contender, self.wanted())  # the reason, if it is not installed
        # A file, not a pipe, which a worker that outlives the server would keep open.
        with tempfile.NamedTemporaryFile() as said:
            server, port = _serve(contender, loop, said)
            try:
                _rise()
                return run_async(lambda: _measure(port, effort), loop)
            except (OSError, RuntimeError, ExceptionGroup) as error:
                told = of_output(Path(said.name).read_text(errors="replace"))
                raise NotMeasuredError(f"failed: {told or of_error(error)}") from error
            finally:
                _end(server)

    async def measure(self, contender: Contender, effort: Effort) -> Figures:
        raise NotImplementedError("the contender runs in a server of its own")


def _serve(contender: str, loop: str, said: IO[bytes]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server that writes its errors to ``said``; it and its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        # Connections inherit it. Servers set it themselves, but not on what --fd gives them.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "uvicorn",
                "benchmarks.site.asgi:application",
                "--fd",
                str(listener.fileno()),
                "--loop",
                loop,
                "--no-access-log",
                "--log-level",
                "warning",
                "--lifespan",
                "on",
            ],
            env={
                **os.environ,
                "BENCH_CONTENDER": contender,
                "DJANGO_SETTINGS_MODULE": "benchmarks.site.settings",
            },
            pass_fds=[listener.fileno()],
            stderr=said,
            # A group of its own, to be ended as a whole, and still in the session of its cell,
            # which is ended when the cell takes too long.
            process_group=0,
        )
        port: int = listener.getsockname()[1]
    return server, port


def _rise() -> None:
    try:
        os.nice(-10)
    except PermissionError:
        return


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server, and with it the workers that would keep the port."""
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nobody was left


async def _measure(port: int, effort: Effort) -> Figures:
    async with asyncio.timeout(PATIENCE):
        connections = [await load.connect(port) for _ in range(CLIENTS + VISITORS)]
        # The socket listens before the server runs: this waits for the server.
        await connections[0].get("/light")
    seconds = effort.pick(5.0, 2.0)
    async with asyncio.timeout(seconds + PATIENCE):
        await _load(connections, 1.0)
        figures = await _load(connections, seconds)
    for connection in connections:
        connection.close()
    return figures


async def _load(connections: list[load.Connection], seconds: float) -> Figures:
    begin = time.perf_counter()
    end = begin + seconds
    light = asyncio.create_task(load.paced(connections[CLIENTS:], "/light", LIGHT_INTERVAL, end))
    counts = await asyncio.gather(
        *(
            load.saturate(connection, _paths(seed), end)
            for seed, connection in enumerate(connections[:CLIENTS])
        )
    )
    taken = time.perf_counter() - begin
    durations = [1e3 * duration for duration in await light]
    return {
        "requests": sum(counts) / taken,
        "light_p50": percentile(durations, 50),
        "light_p99": percentile(durations, 99),
    }


def _paths(seed: int) -> Iterator[str]:
    chance = random.Random(seed)
    return (f"/cpu/{chance.randint(1_000, 5_000)}" for _ in count())


GROUPS = (Http(),)
