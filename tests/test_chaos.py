"""A few seconds of chaos and a small soak; and that neither overlooks a broken promise.

The long ones are `make chaos` and `make soak`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leasepool_django.engine.line import Call, Waiter
from leasepool_django.exceptions import CallTimeoutError, WorkerCrashedError
from tests import jobs
from tests.chaos.jobs import ChaosError
from tests.chaos.ledger import Kind, Ledger, Outcome, judge
from tests.chaos.watch import LineWatch, Sampler, watch_line
from tests.managers import running
from tests.process_pools import ROOT, new_manager
from tests.stage import Stage
from tests.waiting import async_wait_until, wait_until

# Seconds in which a run that hangs is ended.
PATIENCE = 100.0


def chaos(*arguments: object) -> str:
    """Run ``python -m tests.chaos``; returns what it printed if every promise was kept."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *map(str, arguments)],
        cwd=ROOT,
        # Development mode makes event loops several times slower.
        env={**os.environ, "PYTHONDEVMODE": ""},
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr[-10_000:]}"
    assert not run.stderr, run.stderr[-10_000:]
    return run.stdout


def test_seconds_of_chaos_break_no_promise() -> None:
    text = chaos("--seconds", 4, "--min-calls", 200, "--min-kills", 10)
    assert "every promise was kept" in text
    assert "seed " in text


def test_a_small_soak_leaves_memory_and_descriptors_as_they_were() -> None:
    text = chaos("--soak", "--calls", 5000, "--min-calls", 5000)
    assert "every promise was kept" in text
    assert "0 kills" in text


def test_a_run_of_few_calls_is_not_taken_for_a_proof() -> None:
    with pytest.raises(AssertionError, match="calls were made; 1000000 were to be"):
        chaos("--soak", "--calls", 10, "--min-calls", 1_000_000)


# --- what the observers would see -----------------------------------------------------------------


def calls(count: int) -> list[Waiter]:
    return [Call(None, print, b"", None) for _ in range(count)]


def test_the_watch_sees_one_who_overtakes() -> None:
    offences: list[str] = []
    watch = LineWatch(offences.append)
    first, second, third = calls(3)
    for waiter in (first, second, third):
        watch.join(waiter)
    watch.leave(first)
    watch.grant(second)
    assert not offences
    watch.join(first)
    watch.grant(first)
    (offence,) = offences
    assert "overtook" in offence
    watch.pass_by()
    assert "a newcomer overtook a line of 1" in offences[1]


def test_the_watch_knows_of_calls_that_come_back() -> None:
    offences: list[str] = []
    watch = LineWatch(offences.append)
    returned, first = calls(2)
    watch.join(first)
    watch.rejoin(returned)
    watch.grant(returned)
    watch.grant(first)
    assert not offences
    watch.join(first)
    watch.rejoin(returned)
    watch.grant(first)
    assert "before a call that had been served before" in offences[0]


def test_the_watch_follows_the_line_of_a_manager(stage: Stage) -> None:
    offences: list[str] = []
    with running() as manager:
        manager.stop_sync()
        watch = watch_line(manager, offences.append)
        manager.start_sync()

        async def many() -> None:
            first = asyncio.create_task(manager.run(jobs.hold, stage.folder, "first"))
            await stage.wait_begun_async("first")
            others = [asyncio.create_task(manager.run(abs, -n)) for n in range(50)]
            await async_wait_until(lambda: manager.stats().waiting == 50)
            stage.let_go()
            await asyncio.gather(first, *others)

        asyncio.run(many())
        assert watch.joined == watch.granted == 50
    assert not offences


def test_the_ledger_sees_calls_that_were_lost_or_run_twice(tmp_path: Path) -> None:
    ledger = Ledger(harmed=True)
    once, twice, never, refused, given_up = (ledger.begin(Kind.QUICK) for _ in range(5))
    for number in (once, twice, never):
        ledger.value(number, right=True)
    ledger.abandon(refused)
    assert ledger.still_open() == [ledger.still_open()[0]]
    ledger.abandon(given_up)
    assert not ledger.still_open()
    marks = tmp_path / "marks"
    marks.write_text(f"{once}\n{twice}\n{refused}\n{twice}\n")
    assert ledger.check_marks(marks) == 3
    assert ledger.wrong == [
        f"call {twice} (QUICK) was run 2 times; then: VALUE",
        f"call {never} (QUICK) was answered without being run",
    ]


def test_the_ledger_sees_answers_that_were_not_promised() -> None:
    ledger = Ledger(harmed=False)
    number = ledger.begin(Kind.QUICK)
    ledger.error(number, CallTimeoutError("it ran longer than its call_timeout of 1 s"))
    ledger.value(ledger.begin(Kind.QUICK), right=False)
    ledger.value(ledger.begin(Kind.FAILING), right=True)
    ledger.error(number, ChaosError(number))
    assert [text.partition(")")[2] for text in ledger.wrong] == [
        " raised CallTimeoutError: it ran longer than its call_timeout of 1 s",
        " returned another value",
        " returned a value",
        " ended twice, the second time it raised ChaosError: 0",
    ]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ChaosError(7), Outcome.OWN_ERROR),
        (ChaosError(8), Outcome.WRONG),
        (asyncio.CancelledError(), Outcome.CANCELLED),
        (WorkerCrashedError("The worker (pid 1) died."), Outcome.WRONG),
        (RuntimeError(), Outcome.WRONG),
    ],
)
def test_an_error_is_judged_by_its_class_and_its_text(
    error: BaseException, outcome: Outcome
) -> None:
    assert judge(error, 7) is outcome


def test_the_sampler_sees_figures_that_are_not_the_systems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offences: list[str] = []
    manager = new_manager(2)
    manager.start_sync()
    try:
        wait_until(lambda: manager.stats().idle_workers == 2)
        sampler = Sampler(manager, offences.append, 0.1)
        with sampler.sampling() as samples:
            wait_until(lambda: samples.equal > 2)
            assert samples.most == 2
            assert not offences
            monkeypatch.setattr(manager._backend, "live_workers", lambda: 3)
            wait_until(lambda: offences)
    finally:
        manager.stop_sync(grace=0)
    assert "stats() tells of 3 workers" in offences[0]
    assert "there are 2" in offences[0]
