"""A process that does harm: signals to the workers and fork servers of another one.

``python -m tests.chaos.killer <pid> <seed> <signals a second>``. It reads ``go`` and ``pause`` on
its standard input, answers ``going`` and ``paused`` (whatever it had stopped goes on again), and
ends with it. It writes a line of JSON for each signal it has sent. It harms descendants of ``pid``
only, through descriptors of processes, so that a number that was used again is never hit.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from tests.process_table import children, fork_servers

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Killer"]

# What is done how often, of a hundred.
WORKER_KILL, WORKER_STOP, WORKER_TERM = 52, 20, 12
SERVER_STOP, SERVER_TERM, SERVER_KILL = 6, 6, 4
WORKER_STOP_SECONDS = (0.005, 0.3)
SERVER_STOP_SECONDS = (0.005, 0.9)


@contextmanager
def process_descriptor(pid: int, parent: int) -> Iterator[int | None]:
    """A descriptor of ``pid`` if it is a child of ``parent``; else ``None``."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # Asked again now that the number cannot come to mean another process unnoticed.
        related = pid in (fork_servers(parent) + children(parent))
        yield descriptor if related else None
    finally:
        os.close(descriptor)


class Killer:
    """Chooses whom to harm, and how, by its seed."""

    def __init__(self, server: int, seed: str, rate: float, tell: Callable[..., None]) -> None:
        self._server = server
        self._rate = rate
        self._tell = tell
        self._random = random.Random(seed)
        self._stopped: list[tuple[float, int, str, int]] = []  # until when, descriptor, what, pid

    def serve(self) -> None:
        """Until standard input ends."""
        poller = select.poll()
        poller.register(sys.stdin.fileno(), select.POLLIN)
        going = False
        try:
            while True:
                if poller.poll(self._pause(going=going)):
                    order = sys.stdin.readline().strip()
                    if not order:
                        return
                    going = order == "go"
                    if not going:
                        self._continue_until(float("inf"))
                    self._tell("going" if going else "paused")
                elif going:
                    self._continue_until(time.monotonic())
                    self._harm()
        finally:
            self._continue_until(float("inf"))

    def _pause(self, *, going: bool) -> float | None:
        """Milliseconds until the next deed."""
        return self._random.expovariate(self._rate) * 1000 if going else None

    def _harm(self) -> None:
        servers = fork_servers(self._server)
        if not servers:
            return
        deeds: list[tuple[int, Callable[[int], None]]] = [
            (WORKER_KILL, lambda pid: self._to_worker(pid, signal.SIGKILL)),
            (WORKER_STOP, lambda pid: self._to_worker(pid, signal.SIGSTOP)),
            (WORKER_TERM, lambda pid: self._to_worker(pid, signal.SIGTERM)),
            (SERVER_STOP, lambda pid: self._to_server(pid, signal.SIGSTOP)),
            (SERVER_TERM, lambda pid: self._to_server(pid, signal.SIGTERM)),
            (SERVER_KILL, lambda pid: self._to_server(pid, signal.SIGKILL)),
        ]
        weights = [weight for weight, _ in deeds]
        _, deed = self._random.choices(deeds, weights)[0]
        deed(self._random.choice(servers))

    def _to_worker(self, server: int, number: signal.Signals) -> None:
        workers = children(server)
        if workers:
            self._send(self._random.choice(workers), server, "worker", number, WORKER_STOP_SECONDS)

    def _to_server(self, server: int, number: signal.Signals) -> None:
        self._send(server, self._server, "fork server", number, SERVER_STOP_SECONDS)

    def _send(
        self,
        pid: int,
        parent: int,
        what: str,
        number: signal.Signals,
        stop_seconds: tuple[float, float],
    ) -> None:
        with process_descriptor(pid, parent) as descriptor:
            if descriptor is None:
                return
            if number == signal.SIGKILL:
                self._tell("sends", number.name, what, pid)  # before anybody can ask for it
            try:
                signal.pidfd_send_signal(descriptor, number)
            except ProcessLookupError:
                return
            if number == signal.SIGSTOP:
                until = time.monotonic() + self._random.uniform(*stop_seconds)
                heapq.heappush(self._stopped, (until, os.dup(descriptor), what, pid))
        self._tell("sent", number.name, what, pid)

    def _continue_until(self, now: float) -> None:
        while self._stopped and self._stopped[0][0] <= now:
            _, descriptor, what, pid = heapq.heappop(self._stopped)
            with suppress(ProcessLookupError):  # killed while it was stopped
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
                self._tell("sent", signal.SIGCONT.name, what, pid)
            os.close(descriptor)


def _tell(*facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Entry point."""
    with suppress(BrokenPipeError):  # the other end is gone, and so is whom to harm
        Killer(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), _tell).serve()


if __name__ == "__main__":
    main()
