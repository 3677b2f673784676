"""What the machine gives without any library: bare processes, pipes and memory.

None is a proof that nothing can be faster: ``blocking_pipe`` is the standard library's way, with a
frame around each message that takes a second read, and ``one_socket`` beats it.
Each floor is a function that takes the effort and returns metrics named as its group's.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import select
import signal
import socket
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from . import jobs
from .measuring import Effort, percentile

__all__ = [
    "blocking_pipe",
    "fresh_fork",
    "memcpy_and_sum",
    "one_socket",
    "share_out",
    "two_sockets",
    "unframed_pipe",
]

_NAME = "benchmarks.jobs:tiny"

Send = Callable[[bytes], Any]
Receive = Callable[[], bytes]


class _Child:
    """A forked child that answers calls, one at a time, as plainly as it can be done.

    The pickling is that of this package: a function goes by its name, the outcome by itself.
    """

    def __init__(self, exchange: tuple[Send, Receive, Receive, Send]) -> None:
        self.send, receive_call, self.receive, send_answer = exchange
        self.pid = os.fork()
        if self.pid == 0:
            functions = {_NAME: jobs.tiny}
            while True:
                name, args, kwargs, _context = pickle.loads(receive_call())
                send_answer(pickle.dumps(functions[name](*args, **kwargs), 5))

    def call(self, *args: Any) -> Any:
        """One round trip."""
        self.begin(*args)
        return self.outcome()

    def begin(self, *args: Any) -> None:
        """Send a call."""
        self.send(pickle.dumps((_NAME, args, {}, None), 5))

    def outcome(self) -> Any:
        """Wait for its outcome."""
        return pickle.loads(self.receive())

    def end(self) -> None:
        """Kill the child and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _connections() -> tuple[Send, Receive, Receive, Send]:
    here, there = multiprocessing.Pipe()
    return here.send_bytes, there.recv_bytes, here.recv_bytes, there.send_bytes


def _descriptors() -> tuple[Send, Receive, Receive, Send]:
    calls, send = os.pipe()
    receive, answers = os.pipe()
    return (
        functools.partial(os.write, send),
        functools.partial(os.read, calls, 65_536),
        functools.partial(os.read, receive, 65_536),
        functools.partial(os.write, answers),
    )


def blocking_pipe(effort: Effort) -> dict[str, float]:
    """Round trips over a blocking ``multiprocessing.Pipe()``, in microseconds: ``p50``, ``p99``."""
    return _round_trips(_Child(_connections()), effort)


def one_socket(effort: Effort) -> dict[str, float]:
    """The same over ``socket.socketpair()``: one ``send`` and one ``recv`` each way."""
    here, there = socket.socketpair()
    receive_call = functools.partial(there.recv, 65_536)
    receive = functools.partial(here.recv, 65_536)
    with here, there:
        return _round_trips(_Child((here.send, receive_call, receive, there.send)), effort)


def unframed_pipe(effort: Effort) -> dict[str, float]:
    """The same over two of ``os.pipe()``, without frames: for messages that come in one piece."""
    return _round_trips(_Child(_descriptors()), effort)


def _round_trips(child: _Child, effort: Effort) -> dict[str, float]:
    clock = time.perf_counter
    durations: list[float] = []
    for _ in range(500):
        child.call(1)
    end = clock() + effort.pick(1.5, 0.4)
    while len(durations) < 20_000:
        begin = clock()
        child.call(1)
        now = clock()
        durations.append(1e6 * (now - begin))
        if now >= end:
            break
    child.end()
    return {"p50": median(durations), "p99": percentile(durations, 99)}


def two_sockets(effort: Effort) -> dict[str, float]:
    """``calls`` a second over two of ``socket.socketpair()``, each with one call at a time.

    Each call waits until its child has been woken, and its answer until this process has.
    """
    pairs = [socket.socketpair() for _ in range(2)]
    children = {}
    poll = select.poll()
    for here, there in pairs:
        receive_call = functools.partial(there.recv, 65_536)
        receive = functools.partial(here.recv, 65_536)
        children[here.fileno()] = _Child((here.send, receive_call, receive, there.send))
        poll.register(here, select.POLLIN)
    clock = time.perf_counter
    done = 0
    for child in children.values():
        child.begin(1)
    begin = clock()
    end = begin + effort.pick(2.0, 0.5)
    while (now := clock()) < end:
        for descriptor, _ in poll.poll():
            child = children[descriptor]
            child.outcome()
            child.begin(1)
            done += 1
    for child in children.values():
        child.end()
    for here, there in pairs:
        here.close()
        there.close()
    return {"calls": done / (now - begin)}


def fresh_fork(effort: Effort) -> float:
    """Milliseconds from killing a child to the answer of the next one; the median of several."""
    durations = []
    child = _Child(_descriptors())
    child.call(1)
    for _ in range(effort.pick(40, 20)):
        begin = time.perf_counter()
        child.end()
        child = _Child(_descriptors())
        child.call(1)
        durations.append(1e3 * (time.perf_counter() - begin))
    child.end()
    return median(durations)


def memcpy_and_sum(size: int, effort: Effort) -> float:
    """Milliseconds to copy an array of ``size`` bytes into warm memory and to add it up there."""
    import numpy as np

    source = np.ones(size // 8)
    target = np.zeros(size // 8)
    durations = []
    for _ in range(effort.pick(30, 10)):
        begin = time.perf_counter()
        np.copyto(target, source)
        jobs.array_sum(target)
        durations.append(1e3 * (time.perf_counter() - begin))
    return median(durations)


def share_out(calls: int, processes: int, work: Callable[[], Any]) -> float:
    """Seconds until ``processes`` forked processes have done ``work()`` ``calls`` times in all.

    Each has its share beforehand, and nothing is sent: what the machine gives at best.
    """
    begin = time.perf_counter()
    children = []
    for number in range(processes):
        pid = os.fork()
        if pid == 0:
            for _ in range(number, calls, processes):
                work()
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    return time.perf_counter() - begin
