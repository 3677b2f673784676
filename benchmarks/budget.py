"""``python -m benchmarks.budget``: where the time of a call goes, as Markdown tables.

First of a tiny one. Each step is timed by itself, warm, the best of several repetitions; what the
whole call takes beyond them is the last line: the switches between the processes, and that each
finds its caches as the other has left them. Then what large payloads cost the thread, or the event
loop, that sends and receives them, again when everything is warm; and from which size on shared
memory is the quicker way.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import socket
from collections.abc import Callable
from functools import partial
from io import FileIO
from statistics import median
from timeit import repeat
from typing import Any

from leasepool_django import ExecutorLease, LeasedExecutorManager
from leasepool_django.backends.process import wire, worker
from leasepool_django.backends.process.encoding import Encoder
from leasepool_django.backends.process.link import Link
from leasepool_django.backends.process.preparation import Setup
from leasepool_django.backends.process.shared import THRESHOLD, Payload, Segment
from leasepool_django.backends.process.tray import LARGEST, Tray, TrayReader

from . import jobs
from .floors import one_socket
from .measuring import Effort, timed_calls

CALLS = 20_000
SIZE = 16_000_000  # bytes of a large payload


def microseconds(step: Callable[[], object]) -> float:
    """Microseconds that ``step`` takes when everything it needs is at hand."""
    return 1e6 * min(repeat(step, number=CALLS, repeat=7)) / CALLS


class Wireless:
    """A worker's socket and tray, that take everything, and give the same answer to everything."""

    next = 0  # the number of a tray's next message

    def __init__(self, answer: bytes = b"") -> None:
        self.answer = answer

    def put(self, data: bytes) -> None:
        """As if it lay there."""

    def send(self, data: bytes) -> int:
        """As if all of it had been sent."""
        return len(data)

    def recv(self, size: int) -> bytes:
        """The answer."""
        return self.answer


def system_calls(call: bytes, outcome: bytes) -> tuple[float, float]:
    """What a call's two system calls take where nobody waits, and those of its outcome."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
    here, there = socket.socketpair()
    with FileIO(reading, "r") as end, FileIO(writing, "w") as start, here, there:

        def by_pipe() -> None:
            start.write(call)
            end.read(LARGEST)

        def by_socket() -> None:
            there.send(outcome)
            here.recv(wire.RECEIVE)

        return microseconds(by_pipe), microseconds(by_socket)


def of_the_worker(call: bytes) -> tuple[float, float, float]:
    """Receiving a frame with its system calls, running its call, sending the outcome's frame."""
    here, there = socket.socketpair()
    tray = Tray.create()
    assert tray is not None
    link = Link(there, TrayReader([os.dup(end.fileno()) for end in tray.theirs]))

    def receive() -> None:
        tray.put(call)
        link.next_frame()

    with here, there:
        receiving = microseconds(receive)
    tray.close()
    runner = worker._Runner(link, Setup("budget", spawn=False), None)  # private: what it costs
    wireless: Any = Wireless()
    wireless.sendall = wireless.send
    link.channel = wireless
    body = call[wire.HEADER_SIZE :]
    sending = microseconds(lambda: link.send(b"thirteen bytes"))
    return receiving, microseconds(lambda: runner.call(pickle.loads, body)) - sending, sending


async def measure() -> list[tuple[str, float]]:
    """The steps, in the order in which a call takes them, and the whole."""
    manager = LeasedExecutorManager(max_pools=1, workers_per_pool=1)
    await manager.start()
    try:
        async with manager.lease() as lease:
            return await _steps(manager, lease)
    finally:
        await manager.stop(grace=0)


async def _steps(manager: LeasedExecutorManager, lease: ExecutorLease) -> list[tuple[str, float]]:
    timed = await timed_calls(
        lambda: lease.run(jobs.tiny, 1), seconds=3.0, at_least=20, at_most=CALLS
    )
    whole = 1e6 * median(timed)
    state = lease._state  # private: to reach the worker's end of the wire
    (slot,) = state.slots
    process: Any = slot.worker
    calls: Any = manager._calls  # private: the steps of a call, one by one
    encode, dispatcher = calls._encode, calls._dispatcher  # private: as above
    home = asyncio.get_running_loop()

    def account() -> None:
        call = calls.new_call(home, jobs.tiny, (1,), {}, None)
        dispatcher.begin_in(state, call)
        dispatcher.call_ended(process, call, home, retiring=False)

    def in_server() -> None:
        process._eager = 0  # private: else the loop would get its turn
        try:
            lease.run(jobs.tiny, 1).send(None)
        except StopIteration:
            return
        raise AssertionError("the call had to wait")

    sent = encode(jobs.tiny, (1,), {})
    encoding = microseconds(lambda: encode(jobs.tiny, (1,), {}))
    accounting = microseconds(account) - encoding
    outcome = wire.frame(wire.RESULT, pickle.dumps(1, 5))
    ends = process.tray, process._receive  # private: put back below
    wireless = Wireless(outcome)
    process.tray, process._receive = wireless, wireless.recv
    server = microseconds(in_server)
    process.tray, process._receive = ends
    there, back = system_calls(sent, outcome)
    receiving, running, sending = of_the_worker(sent)
    steps = [
        ("server: look the function up, pickle the arguments", encoding),
        ("server: make the call, give it a worker, take it back, count", accounting),
        ("server: coroutine, frames, unpickle the result", server - encoding - accounting),
        ("the call: `write` and `read` of the pipe", there),
        ("the outcome: `send` and `recv` of the socket", back),
        ("worker: frames", receiving - there + sending),
        ("worker: unpickle, run in a fresh context, pickle", running),
    ]
    rest = whole - sum(taken for _, taken in steps)
    return [*steps, ("two switches between the processes, and cold caches", rest), ("all", whole)]


def a_megabyte() -> list[tuple[str, float, float]]:
    """What is sent, and the milliseconds to send and to receive each megabyte of it."""
    import numpy as np

    chance = random.Random(1)
    kinds = {
        "`bytes`": bytes(SIZE),
        "`bytearray`": bytearray(SIZE),
        "a NumPy array": np.ones(SIZE // 8),
        "a list of `float`": [chance.random() for _ in range(SIZE // 9)],
        "a list of `dict`": [{"id": chance.random(), "name": "x"} for _ in range(SIZE // 40)],
    }
    encode = Encoder(None, ()).encode
    rows = []
    for name, value in kinds.items():
        payload = encode(len, (value,), {})
        assert isinstance(payload, Payload)
        layout = memoryview(payload.layout())
        segment = Segment.create(payload.size)

        def send(segment: Segment = segment, value: object = value) -> None:
            payload = encode(len, (value,), {})
            assert isinstance(payload, Payload)
            segment.write(payload)

        sent = repeat(send, number=1, repeat=5)
        received = repeat(partial(segment.read, layout), number=1, repeat=5)
        megabytes = payload.size / 1e6
        rows.append((name, 1e3 * min(sent) / megabytes, 1e3 * min(received) / megabytes))
    return rows


def both_ways() -> list[tuple[str, float, float]]:
    """A payload's size, and microseconds to send it there and back: over the socket, in memory."""
    rows = []
    for size in (THRESHOLD, 2 * THRESHOLD, 4 * THRESHOLD, 16 * THRESHOLD):
        value = bytes(size)
        taken = []
        for shared in (0, 16 * size):
            manager = LeasedExecutorManager(
                max_pools=1, workers_per_pool=1, max_shared_bytes=shared
            )
            manager.start_sync()
            try:
                run = partial(manager.run_sync, jobs.echo, value)
                taken.append(1e6 * median(repeat(run, number=1, repeat=2_000)))
            finally:
                manager.stop_sync(grace=0)
        rows.append((f"{size // 1024} KB", taken[0], taken[1]))
    return rows


def main() -> None:
    """Print the tables."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    bare = one_socket(Effort())["p50"]
    steps = [
        *asyncio.run(measure()),
        ("a forked child that blocks on a socket, for comparison", bare),
    ]
    print("| step | µs |\n|---|---|")
    print("\n".join(f"| {name} | {taken:.1f} |" for name, taken in steps))
    print("\n| a megabyte of | sending (ms) | receiving (ms) |\n|---|---|---|")
    print("\n".join(f"| {name} | {out:.2f} | {back:.2f} |" for name, out, back in a_megabyte()))
    print("\n| there and back | socket (µs) | shared memory (µs) |\n|---|---|---|")
    print(
        "\n".join(
            f"| {size} | {socket_:.0f} | {memory:.0f} |" for size, socket_, memory in both_ways()
        )
    )


if __name__ == "__main__":
    main()
