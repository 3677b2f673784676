"""One run of chaos: callers of every kind, a process that does harm, and observers beside them.

The time is divided into rounds. Between two of them the harm pauses and the callers come to an
end: nobody may wait any more, full capacity has to come back, and memory and descriptors are
measured.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from leasepool_django import LeasedExecutorManager
from tests import leaks
from tests.chaos import jobs
from tests.chaos.callers import lasting_loop, passing_loops, thread_of_calls
from tests.chaos.ledger import Kind, Ledger
from tests.chaos.report import Quiet, Report
from tests.chaos.script import MIX, Mix, Records, World
from tests.chaos.watch import (
    LineWatch,
    Sampler,
    WorkerCensus,
    private_bytes,
    resident_bytes,
    trim_memory,
    watch_line,
)
from tests.waiting import wait_until

__all__ = ["Plan", "run", "soak"]

MAX_POOLS, WORKERS = 2, 3
HANG_SECONDS = 30.0  # a call that is not answered for so long hangs
CAPACITY_SECONDS = 40.0  # within which every worker is back once the harm pauses
FLAT_BYTES = 5_000_000
TASKS = 6  # on each loop
THREADS = 6
HARM_PER_SECOND = 14.0


@dataclass(frozen=True)
class Plan:
    """How long a run is, in seconds or in calls, and what is done in it.

    ``harm``: whether processes are killed and stopped; ``lag``: see ``Sampler``; ``context``: how
    workers are started.
    """

    seed: str
    seconds: float = math.inf
    calls: float = math.inf
    rounds: int = 8
    harm: bool = True
    mix: Mix = field(default_factory=lambda: MIX)
    lag: float = 2.0
    context: str = "forkserver"


def loop_kinds() -> list[tuple[str, Callable[[], asyncio.AbstractEventLoop]]]:
    """The kinds of event loops that are installed."""
    kinds: list[tuple[str, Callable[[], asyncio.AbstractEventLoop]]] = [
        ("asyncio", asyncio.SelectorEventLoop)
    ]
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        kinds.append(("uvloop", uvloop.new_event_loop))
    return kinds


def soak(seed: str, calls: int) -> Plan:
    """Many calls of all sizes, and none that ends a worker but by what it does itself."""
    rare = {Kind.SLOW: 10, Kind.BUSY: 1, Kind.LEAVING: 1, Kind.CHILD: 1}
    rare |= {Kind.TIMED_OUT: 1, Kind.CANCELLED: 1}
    # Nothing is stopped, so that a process is reported as soon as it starts or ends.
    return Plan(seed, calls=calls, rounds=5, harm=False, mix={**MIX, **rare}, lag=0.5)


def run(plan: Plan) -> Report:
    """Do as planned; ``Report.wrong`` lists all that should not have happened."""
    report = Report(plan.seed, bound=MAX_POOLS * WORKERS)
    ledger = Ledger(harmed=plan.harm)
    records = Records(ledger)
    logger = logging.getLogger("tests.chaos.server")
    logger.handlers, logger.propagate = [records], False
    begun = time.monotonic()
    with TemporaryDirectory(prefix="chaos-") as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lease .* was dropped without release", ResourceWarning)
        folder = Path(name)
        marks = folder / "marks"
        marks.touch()
        manager = _manager(plan, logger, marks)
        watch = watch_line(manager, ledger.offend)
        world = World(manager, ledger, records, plan.seed, plan.mix)
        for _, new_event_loop in loop_kinds():
            new_event_loop().close()  # libuv opens a pipe with the first loop and keeps it
        before = leaks.take_snapshot()
        killed: set[int] = set()
        manager.start_sync()
        try:
            sampler = Sampler(manager, ledger.offend, plan.lag)
            report.samples = sampler.samples
            with sampler.sampling(), _harm(plan, report.signals, killed) as order:
                report.quiet.append(_quiet(manager, folder))
                for number in range(1, plan.rounds + 1):
                    order("go")
                    share = number / plan.rounds
                    _round(world, plan.seconds / plan.rounds, share * plan.calls)
                    order("pause")
                    _let_end(world)
                    report.quiet.append(_quiet(manager, folder))
            report.workers_started = manager.stats().workers_started
        finally:
            manager.stop_sync(grace=0)
        if leaked := leaks.new_since(before, timeout=leaks.PATIENCE):
            ledger.offend(leaks.report(leaked))
            leaks.kill(leaked.processes)
        if mapped := _segments():
            ledger.offend(f"{mapped} pieces of shared memory are still mapped")
        report.run = ledger.check_marks(marks)
    _check(ledger, report, watch, killed)
    report.seconds = time.monotonic() - begun
    report.calls, report.outcomes = ledger.calls, ledger.outcomes
    report.records, report.leases = records.seen, world.leases
    report.joined, report.granted, report.longest_line = watch.joined, watch.granted, watch.longest
    report.sent_ahead = watch.sent_ahead
    report.wrong = ledger.wrong
    return report


def _manager(plan: Plan, logger: logging.Logger, marks: Path) -> LeasedExecutorManager:
    quiet = logging.getLogger("tests.chaos.engine")
    quiet.handlers, quiet.propagate = [logging.NullHandler()], False
    sizes = iter(range(1_000_000_000))
    manager = LeasedExecutorManager(
        max_pools=MAX_POOLS,
        workers_per_pool=WORKERS,
        units_per_pool=1,
        size_provider=lambda: next(sizes) % (MAX_POOLS + 1),
        check_interval=0.3,
        lease_grace_seconds=0.03,
        name_prefix="chaos",
        logger=quiet,
        forward_process_logs=True,
        process_log_target_logger=logger,
        initializer=jobs.open_marks,
        initargs=[str(marks)],
        max_tasks_per_child=150,
        mp_context=plan.context,
        start_timeout=15.0,
    )
    # Long calls are sent ahead as well: there is more time for something to happen to them.
    manager._supervisor.dispatcher.ahead.seconds = math.inf
    return manager


# --- rounds ---------------------------------------------------------------------------------------


def _round(world: World, seconds: float, calls: float) -> None:
    """Let callers work for so many seconds, or until so many calls were made; they are to stop."""
    world.stop.clear()
    failed: list[BaseException] = []

    def start(work: Callable[..., None], *arguments: object) -> None:
        def serve() -> None:
            try:
                work(world, *arguments)
            except BaseException as error:  # noqa: BLE001 - a caller's own failure ends the run
                failed.append(error)
                world.ledger.offend(f"{arguments[0]} failed: {error!r}")

        thread = threading.Thread(target=serve, name=f"chaos-{arguments[0]}", daemon=True)
        world.threads.append(thread)
        thread.start()

    for kind, new_event_loop in loop_kinds():
        for number in range(2):
            start(lasting_loop, f"{kind}-{number}", new_event_loop, TASKS)
        start(passing_loops, f"passing-{kind}", new_event_loop, TASKS // 2)
    for number in range(THREADS):
        start(thread_of_calls, f"thread-{number}")
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and world.ledger.calls < calls and not failed:
        world.stop.wait(min(0.2, left))
        if hanging := world.ledger.still_open(older_than=HANG_SECONDS):
            world.ledger.offend(f"hanging: {hanging}")
            break
    world.stop.set()


def _let_end(world: World) -> None:
    """Hold that every caller comes to an end, with an answer to every call."""
    threads, world.threads = world.threads, []
    end = time.monotonic() + HANG_SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        world.ledger.offend(f"callers hang: {world.ledger.still_open()}; {world.manager.stats()}")
        faulthandler.dump_traceback(all_threads=True)
        raise SystemExit("\n".join(world.ledger.wrong))
    if left_open := world.ledger.still_open():
        world.ledger.offend(f"never answered: {left_open}")


def _quiet(manager: LeasedExecutorManager, folder: Path) -> Quiet:
    """Hold that every worker there may be comes back and runs calls at the same time as all.

    What there is then is measured while all are leased, so that none comes or goes.
    """
    deadline = time.monotonic() + CAPACITY_SECONDS
    leases = []
    gc.collect()  # a lease that was dropped together with an error's traceback
    try:
        for _ in range(MAX_POOLS):
            left = max(0.1, deadline - time.monotonic())
            leases.append(manager.acquire_sync(timeout=left, owner="capacity"))
        name = os.urandom(4).hex()
        count = MAX_POOLS * WORKERS
        futures = [
            lease.executor.submit(jobs.meet, folder, name, count)
            for lease in leases
            for _ in range(WORKERS)
        ]
        met = {future.result(max(0.1, deadline - time.monotonic())) for future in futures}
        assert len(met) == count, f"only {len(met)} of {count} workers are there"
        wait_until(  # one may have had its last call
            lambda: manager.stats().live_workers == len(_pids(manager)) == WorkerCensus().count(),
            message=lambda: f"{manager.stats()}",
        )
        # Dead workers whose event loops were closed let go of theirs a little later.
        wait_until(lambda: _measure().segments <= 4 * count, message=lambda: f"{_measure()}")
        return _measure()
    except Exception as error:
        error.add_note(f"{manager.stats()}")
        raise
    finally:
        for lease in leases:
            lease.release_sync()


def _pids(manager: LeasedExecutorManager) -> set[int]:
    workers = [worker for pool in manager.stats().pools for worker in pool.workers]
    return {worker.pid for worker in workers if worker.pid is not None}


def _segments() -> int:
    """How many mappings of shared memory this process has."""
    return Path("/proc/self/maps").read_text().count("/memfd:leasepool")


def _measure() -> Quiet:
    gc.collect()
    found = leaks.take_snapshot().descriptors
    # A worker keeps up to two pieces of shared memory for its next payloads.
    segments = {target: count for target, count in found.items() if "memfd:leasepool" in target}
    kinds: Counter[str] = Counter()
    for target, count in found.items():
        # What another thread reads in /proc just now is its own.
        if target not in segments and not target.startswith("/proc"):
            kinds[target.partition(":")[0]] += count
    trim_memory()
    return Quiet(resident_bytes(), private_bytes(), kinds, sum(segments.values()))


# --- harm -----------------------------------------------------------------------------------------


@contextmanager
def _harm(
    plan: Plan, signals: Counter[tuple[str, str]], killed: set[int]
) -> Iterator[Callable[[str], None]]:
    """Run the process that does harm; gives a function to order "go" and "pause" with."""
    if not plan.harm:
        yield lambda _: None
        return
    command = [sys.executable, "-m", "tests.chaos.killer"]
    done = threading.Condition()
    answers: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            facts = json.loads(line)
            with done:
                if facts[0] == "sends":
                    killed.add(facts[3])
                elif facts[0] == "sent":
                    signals[facts[1], facts[2]] += 1
                else:
                    answers.append(facts[0])
                    done.notify_all()

    with subprocess.Popen(
        [*command, str(os.getpid()), plan.seed, str(HARM_PER_SECOND)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        reader = threading.Thread(target=read, name="chaos-harm")
        reader.start()

        def order(what: str) -> None:
            assert process.stdin is not None
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
            with done:
                assert done.wait_for(lambda: answers, 15.0), "the harmful process hangs"
                answers.clear()

        try:
            yield order
        finally:
            assert process.stdin is not None
            process.stdin.close()
            reader.join(15.0)
            if reader.is_alive():
                process.kill()
                reader.join()


# --- judging --------------------------------------------------------------------------------------


def _check(ledger: Ledger, report: Report, watch: LineWatch, killed: set[int]) -> None:
    """Hold what can only be said at the end."""
    for pid, count in ledger.crashed_pids.items():
        if pid not in killed:
            ledger.offend(f"worker {pid} is said to be killed, but nobody killed it")
        elif count > 1:
            ledger.offend(f"the end of worker {pid} was told to {count} callers")
    server_kills = report.signals["SIGKILL", "fork server"]
    if ledger.crashes_by_server > (server_kills * report.bound):
        ledger.offend(
            f"{ledger.crashes_by_server} calls failed for {server_kills} killed fork servers"
        )
    if not watch.sent_ahead:
        ledger.offend("no call was sent ahead of its turn")
    if watch.granted > watch.joined:
        ledger.offend(f"{watch.granted} were served of {watch.joined} in line")
    if abs(grown := report.growth()) > FLAT_BYTES:
        ledger.offend(f"memory changed by {grown / 1e6:.1f} MB over the second half")
    for quiet in report.quiet:
        if quiet.descriptors != report.quiet[0].descriptors:
            ledger.offend(
                f"descriptors: {quiet.descriptors}, at first {report.quiet[0].descriptors}"
            )
