"""How the benchmarks judge what they have measured, and what they keep of it.

Long because it holds the tests of one folder: verdicts, the page, the guard, and the ends of cells.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import django
import pytest

from benchmarks import guard, jobs, reasons, record, reports, rounds
from benchmarks.contenders import CONTENDERS, Contender, Wanted
from benchmarks.figures import Verdict, medians, verdicts
from benchmarks.goals import GOALS, Goal
from benchmarks.measuring import Effort, NotMeasuredError
from benchmarks.memory import make_ready
from benchmarks.processes import end_session
from benchmarks.record import Record
from benchmarks.rounds import Cell
from benchmarks.workloads import NAMES, footprint, lag, load, start
from leasepool_django.backends.process.system import resident_bytes

if TYPE_CHECKING:
    from tests.conftest import LoopRunner

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def cell(
    group: str,
    contender: str,
    number: int = 0,
    *,
    loop: str = "asyncio",
    floor: bool = False,
    **figures: float,
) -> Cell:
    return Cell(number, group, contender, loop, floor, figures)


def verdict(cells: Sequence[Cell], key: str) -> Verdict:
    (found,) = (found for found in verdicts(cells) if found.goal.key == key)
    return found


def test_every_goal_is_about_something_that_is_measured() -> None:
    for goal in GOALS:
        group = load(goal.group)
        metrics = {metric.name for metric in group.metrics}
        assert goal.metric in metrics, goal
        assert goal.contender in group.contenders, goal
        assert goal.loop is None or goal.loop in group.loops, goal
        assert goal.among is None or goal.among[0] in metrics, goal
        reference = goal.reference or "best"
        if reference.startswith("floor:"):
            assert reference.removeprefix("floor:") in group.floors, goal
        elif reference != "best":
            assert reference in group.contenders, goal


@pytest.mark.parametrize("name", NAMES)
def test_each_group_says_how_many_workers_it_has(name: str) -> None:
    counted = r"\b(\d+|[Oo]ne|no) workers?\b"
    assert re.search(counted, load(name).work) or load(name).work.startswith("As above")


@pytest.mark.parametrize("name", NAMES)
def test_titles_of_floors_are_those_of_its_floors(name: str) -> None:
    group = load(name)
    assert group.floor_titles.keys() <= group.floors.keys()
    assert all(group.title_of(floor) for floor in group.floors)


@pytest.mark.parametrize("name", NAMES)
def test_peers_are_others(name: str) -> None:
    assert not {"lease", "run", "django"} & set(load(name).peers)


def test_a_ratio_is_taken_within_each_round_and_the_middle_one_counts() -> None:
    cells = [
        cell("throughput", contender, number, calls=calls)
        for number, figures in enumerate([(30.0, 10.0), (80.0, 20.0), (50.0, 50.0)])
        for contender, calls in zip(("run", "stdlib"), figures, strict=True)
    ]
    found = verdict(cells, "throughput.calls.run/stdlib")
    assert found.ratio is not None
    assert (found.ratio.low, found.ratio.middle, found.ratio.high) == (1.0, 3.0, 4.0)
    assert found.reached


def test_the_best_peer_is_the_best_of_each_round() -> None:
    cells = [
        cell("latency", "run", 0, p50=10.0),
        cell("latency", "anyio", 0, p50=20.0),
        cell("latency", "pebble", 0, p50=40.0),
        cell("latency", "lease", 0, p50=1.0),
        cell("latency", "run", 1, p50=30.0),
        cell("latency", "anyio", 1, p50=60.0),
        cell("latency", "pebble", 1, p50=20.0),
    ]
    found = verdict(cells, "latency.p50.run/best")
    assert found.ratio is not None
    assert (found.ratio.low, found.ratio.high) == (0.5, 1.5)
    assert found.versus == ("anyio", "pebble")


def test_a_peer_that_does_less_work_is_not_compared_with() -> None:
    cells = [
        cell("http", "django", requests=1000.0, light_p99=4.0),
        cell("http", "anyio", requests=960.0, light_p99=10.0),
        cell("http", "leasepool", requests=500.0, light_p99=1.0),
    ]
    found = verdict(cells, "http.light_p99.django/best")
    assert found.ratio is not None
    assert (found.ratio.middle, found.versus, found.reached) == (0.4, ("anyio",), True)


def test_a_goal_among_peers_that_do_as_much_is_reached_where_none_does() -> None:
    peers = [cell("http", peer, requests=500.0, light_p99=1.0) for peer in load("http").peers]
    ours = cell("http", "django", requests=1000.0, light_p99=4.0)
    found = verdict([ours, *peers], "http.light_p99.django/best")
    assert (found.ratio, found.judged, found.reached) == (None, True, True)
    assert reports.summary([found])[-1].endswith("| no peer does as much of the work | yes |")
    for some in ([], peers[1:]):  # who knows what the others would have done
        alone = verdict([ours, *some], "http.light_p99.django/best")
        assert (alone.judged, alone.reached) == (False, False)
    failed = Cell(1, "http", "django", "asyncio", floor=False, figures={}, reason="failed")
    assert not verdict([ours, *peers, failed], "http.light_p99.django/best").reached


def test_a_cold_start_is_not_compared_with_a_fork_of_the_server() -> None:
    assert "stdlib" in load("start").contenders
    assert "stdlib" not in load("start").peers


def test_a_goal_without_a_figure_of_ours_is_missed() -> None:
    found = verdict(
        [
            cell("http", "anyio", requests=1.0, light_p99=1.0),
            Cell(0, "http", "django", "asyncio", floor=False, figures={}, reason="failed"),
        ],
        "http.requests.django/best",
    )
    assert (found.ratio, found.missing) == (None, (0,))
    assert (found.judged, found.reached) == (True, False)
    assert reports.summary([found])[-1].endswith("| not measured; no figure in round 1 | **no** |")


def test_a_goal_is_reached_only_with_a_figure_of_ours_in_every_round() -> None:
    cells = [
        cell("cancel", "run", 0, next_answer=5.0),
        cell("cancel", "pebble", 1, next_answer=50.0),
        cell("cancel", "run", 2, next_answer=7.0),
    ]
    found = verdict(cells, "cancel.next_answer.run")
    assert found.ratio is not None
    assert (found.ratio.middle, found.missing, found.reached) == (6.0, (1,), False)
    row = reports.summary([found])[-1]
    assert row.endswith(f"| ≤ 12 ms | 6 (5{DASH}7); no figure in round 2 | **no** |")


def test_a_goal_without_what_it_compares_with_is_not_judged() -> None:
    found = verdict([cell("http", "django", requests=1.0)], "http.requests.django/best")
    assert (found.ratio, found.judged, found.reached) == (None, False, False)
    assert reports.summary([found])[-1].endswith(f"| not measured | {DASH} |")
    other = verdict([cell("cancel", "run", next_answer=5.0)], "cancel.next_answer.run")
    assert reports.tally([found, other]) == "1 of 2 goals reached, 1 not measured"
    assert reports.tally([other]) == "1 of 1 goals reached"


def test_metrics_that_the_first_round_did_not_give_are_shown() -> None:
    cells = [cell("waiting", "run", 0, few=1.0), cell("waiting", "run", 1, few=3.0, many=5.0)]
    found = medians(cells, "waiting")["run", "asyncio"]
    assert (found["few"].middle, found["many"].middle) == (2.0, 5.0)


def kept(*cells: Cell, date: str = "2026-01-31", **versions: str) -> Record:
    return Record(date, "Python 3.14.1 on Linux", versions, cells)


def test_what_failed_is_listed_with_its_rounds_and_reason() -> None:
    def failed(contender: str, number: int, reason: str) -> Cell:
        return Cell(number, "cancel", contender, "uvloop", floor=False, figures={}, reason=reason)

    page = reports.page(
        {
            "cancel": kept(
                cell("cancel", "pebble", 0, loop="uvloop", next_answer=9.0),
                failed("pebble", 1, "did not end within 60 s"),
                failed("pebble", 2, "did not end within 60 s"),
                failed("dask", 0, "cannot stop a function that runs"),
                failed("dask", 1, "cannot stop a function that runs"),
            )
        },
        set(),
    )
    listed = [line for line in page.splitlines() if line.startswith("* ") and "uvloop" in line]
    assert listed == [
        "* pebble on uvloop, rounds 2, 3: did not end within 60 s",
        "* Dask LocalCluster on uvloop: cannot stop a function that runs",
    ]
    assert f"| pebble | uvloop | 9 (9{DASH}9) |" in page


def test_the_page_dates_each_group_only_where_they_differ() -> None:
    cancel = kept(cell("cancel", "run", next_answer=9.0), pebble="5.1", Django="6.0")
    lag = kept(cell("lag", "run", idle=1.0), date="2026-02-01", pebble="5.2", Django="6.0")
    page = reports.page({"cancel": cancel, "lag": lag}, {"lag"})
    assert page.count("Measured on 2026-01-31 with Python 3.14.1 on Linux, in one round.") == 1
    assert page.count("Measured on 2026-02-01") == 1
    assert "| Django | 6.0 |" in page
    assert "| pebble | 5.1 (cancel); 5.2 (lag) |" in page
    assert "(benchmarks/lag.svg)" in page
    assert "cancel.svg" not in page
    same = reports.page({"cancel": cancel, "workers": cancel}, set())
    assert same.count("Measured on") == 1


def test_groups_measured_later_keep_what_was_measured_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "DATA", tmp_path / "benchmarks.json")
    assert record.read() == {}
    record.save([cell("lag", "run", idle=1.0), cell("fairness", "run", of_ideal=1.0)])
    record.save([cell("fairness", "run", of_ideal=2.0), cell("cancel", "run", next_answer=9.0)])
    found = record.read()
    assert list(found) == ["fairness", "lag", "cancel"]
    assert found["fairness"].cells == [cell("fairness", "run", of_ideal=2.0)]
    assert found["lag"].cells == [cell("lag", "run", idle=1.0)]
    assert found["lag"].versions["Django"] == django.__version__


def test_every_contender_from_an_index_has_a_version_in_the_extra() -> None:
    extra = tomllib.loads((record.DATA.parents[1] / "pyproject.toml").read_text())
    named = " ".join(extra["project"]["optional-dependencies"]["bench"]).lower()
    for entry in CONTENDERS.values():
        assert (entry.kind.distribution or "leasepool").lower() in named


@dataclass
class Machine:
    """What the guard measures, run by run: the ratio to a floor in one group, to stdlib in another.

    ``None``: our cell failed. ``asked``: the groups of each run so far.
    """

    baseline: Path
    throughput: list[float | None] = field(default_factory=list)
    payloads: list[float | None] = field(default_factory=list)
    asked: list[Sequence[str]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def run_rounds(
        self, names: Sequence[str], count: int, effort: Effort, tell: object
    ) -> list[Cell]:
        assert effort.quick
        self.asked.append(names)
        found = []
        for number in range(count):
            for name, queue, metric in (
                ("throughput", self.throughput, "calls"),
                ("payloads", self.payloads, "bytes_echo"),
            ):
                if name in names:
                    value = queue.pop(0)
                    figures = {} if value is None else {metric: 10 * value}
                    found += [
                        Cell(number, name, "run", "asyncio", floor=False, figures=figures),
                        Cell(number, name, "stdlib", "asyncio", floor=False, figures={metric: 10}),
                        Cell(number, name, "two sockets", "-", floor=True, figures={metric: 10}),
                    ]
        return found

    def check(self) -> bool:
        return guard.check(self.told.append)


CALLS = "throughput.calls.run/floor:two sockets@asyncio"
ECHO = "payloads.bytes_echo.run/stdlib@asyncio"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """10 and 0.5 are stored."""
    machine = Machine(tmp_path / "baseline.json")
    monkeypatch.setattr(guard, "run_rounds", machine.run_rounds)
    monkeypatch.setattr(guard, "BASELINE", machine.baseline)
    monkeypatch.setattr(guard, "QUICK_GROUPS", ("throughput", "payloads"))
    floor = "floor:two sockets"
    goals = (Goal("throughput", "calls", "run", floor, 0.5, at_least=True, loop="asyncio"),)
    monkeypatch.setattr(guard, "GOALS", goals)
    monkeypatch.setattr(
        guard, "STANDING_IN", (Goal("payloads", "bytes_echo", "run", "stdlib", 1.0),)
    )
    machine.baseline.write_text(json.dumps({CALLS: 10.0, ECHO: 0.5}))
    return machine


def test_the_median_of_five_runs_is_stored(machine: Machine) -> None:
    machine.throughput += [9.0, 30.0, 10.0, 9.5, 11.0]
    machine.payloads += [0.5, 0.6, 0.2, 0.4, 0.55]
    assert guard.store(machine.told.append)
    assert json.loads(machine.baseline.read_text()) == {CALLS: 10.0, ECHO: 0.5}


def test_nothing_is_stored_where_a_run_has_no_figure(machine: Machine) -> None:
    machine.throughput += [90.0, None, 90.0, 90.0, 90.0]
    machine.payloads += [0.1, 0.1, 0.1, 0.1, 0.1]
    assert not guard.store(machine.told.append)
    assert machine.told[0] == f"{CALLS} was not measured (run: no figures)"
    assert json.loads(machine.baseline.read_text())[CALLS] == 10.0


def test_the_guard_lets_what_is_as_fast_pass(machine: Machine) -> None:
    machine.throughput += [8.1]
    machine.payloads += [0.62]
    assert machine.check()
    assert machine.asked == [("throughput", "payloads")]


def test_the_guard_fails_what_is_slower_each_time(machine: Machine) -> None:
    machine.throughput += [7.9, 6.0, 7.9]
    machine.payloads += [0.5]
    assert not machine.check()
    assert machine.told[-1] == f"{CALLS}: 1.27 times as slow as stored"
    # What was not worse is not measured again.
    assert machine.asked[1:] == [["throughput"], ["throughput"]]


def test_the_guard_does_not_take_one_slow_run_for_a_slow_change(machine: Machine) -> None:
    machine.throughput += [5.0, 9.5]
    machine.payloads += [0.5]
    assert machine.check()


def test_the_guard_fails_where_our_cells_failed(machine: Machine) -> None:
    machine.throughput += [None]
    machine.payloads += [0.5]
    assert not machine.check()
    assert machine.told == [f"{CALLS} was not measured (run: no figures)"]


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({CALLS: 10.0}, f"{ECHO} is measured and not stored"),
        ({CALLS: 10.0, ECHO: 0.5, "lag.idle.run@-": 1.0}, "lag.idle.run@- is stored and not"),
        ({}, "make bench-baseline"),
        (None, "make bench-baseline"),
    ],
)
def test_the_guard_fails_what_it_cannot_compare(
    machine: Machine, stored: dict[str, float] | None, said: str
) -> None:
    if stored is None:
        machine.baseline.unlink()
    else:
        machine.baseline.write_text(json.dumps(stored))
    assert not machine.check()
    assert said in machine.told[0]
    assert machine.asked == []


def test_the_guard_compares_ratios_only() -> None:
    keys = guard.compared()
    assert {goal.group for goal in keys.values()} == set(guard.QUICK_GROUPS)
    for goal in keys.values():
        (metric,) = (one for one in load(goal.group).metrics if one.name == goal.metric)
        assert goal.reference is not None or metric.unit == TIMES, goal
        assert goal.reference != "best", goal
    # By itself it would tell how busy the machine is.
    assert "fairness.of_ideal.run@asyncio" not in keys
    assert "fairness.of_ideal.run/floor:two bare processes@asyncio" in keys
    # So would this: what Python costs beside a bare pipe differs between machines.
    assert not [key for key in keys if key.startswith("latency.") and "/floor:" in key]
    assert "latency.p50.run/stdlib@uvloop" in keys
    assert "throughput.calls.run/anyio@asyncio" in keys


@pytest.mark.parametrize(("metric", "kept"), [("next_answer", False), ("efficiency", True)])
def test_a_figure_in_milliseconds_is_no_ratio(
    monkeypatch: pytest.MonkeyPatch, metric: str, *, kept: bool
) -> None:
    monkeypatch.setattr(guard, "QUICK_GROUPS", ("batch", "cancel"))
    found = {goal.metric for goal in guard.compared().values()}
    assert (metric in found) is kept


def test_the_stored_ratios_are_those_that_are_compared() -> None:
    if guard.BASELINE.exists():
        assert json.loads(guard.BASELINE.read_text()).keys() == guard.compared().keys()


class Growing(Contender):
    """Threads in the place of workers: each call says it is answered by the next of ``pids``."""

    def __init__(self, pids: Sequence[int]) -> None:
        super().__init__(Wanted(), None)
        self._pids = iter(pids)
        self.run = self._run

    async def _run(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        if fn is jobs.hold:
            await asyncio.to_thread(fn, *args)
        elif fn is jobs.django_worker:
            return next(self._pids)
        return None

    async def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        """Nothing to end."""


def next_workers(monkeypatch: pytest.MonkeyPatch, pids: Sequence[int]) -> dict[str, float]:
    monkeypatch.setattr(start, "SETTLED", 0)
    monkeypatch.setattr(start, "processes", lambda: {1, 2, 3})
    monkeypatch.setattr(start, "private_memory", lambda pid: pid * 1_000_000)
    return asyncio.run(start.NextWorker().measure(Growing(pids), Effort(quick=True)))


def test_only_workers_that_were_started_for_the_call_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next_workers(monkeypatch, [2, 7, 3, 8, 9])["private"] == 8.0


def test_workers_started_ahead_of_need_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotMeasuredError, match="starts workers ahead of need"):
        next_workers(monkeypatch, [1, 2, 3, 1, 2])


def stderr_of(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=False, capture_output=True, text=True).stderr


def test_the_reason_is_the_last_error_not_a_warning_after_it() -> None:
    program = (
        "import warnings\n"
        "try:\n"
        "    {}['first']\n"
        "except KeyError:\n"
        "    try:\n"
        "        raise ConnectionError('nobody answers\\nat all')\n"
        "    finally:\n"
        "        import atexit; atexit.register(warnings.warn, 'old')\n"
    )
    said = stderr_of(program)
    assert "UserWarning: old" in said
    assert reasons.of_output(said) == "ConnectionError: nobody answers"


def test_the_reason_of_a_group_of_errors_is_its_first_error() -> None:
    group = "raise ExceptionGroup('several', [ExceptionGroup('some', [KeyError('this')])])"
    assert reasons.of_output(stderr_of(group)) == "KeyError: 'this'"
    error = ExceptionGroup("several", [ExceptionGroup("some", [KeyError("this")])])
    assert reasons.of_error(error) == "KeyError: 'this'"


def test_an_error_that_a_server_logged_is_found() -> None:
    said = (
        "ERROR:    Traceback (most recent call last):\n"
        '  File "pool.py", line 7, in start\n'
        "    begin()\n"
        "pool.errors.PoolError: no worker came up\n"
        "\n"
        "ERROR:    Application startup failed. Exiting.\n"
    )
    assert reasons.of_output(said) == "PoolError: no worker came up"


def test_without_an_error_the_last_line_that_is_no_warning_is_the_reason() -> None:
    shown = warnings.formatwarning("old", UserWarning, "pool.py", 7, "    warnings.warn(")
    assert reasons.of_output(f"out of memory\n{shown}") == "out of memory"
    assert reasons.of_output(shown) is None
    assert reasons.of_output("") is None
    assert reasons.of_error(TimeoutError()) == "TimeoutError"


def run_cell(tmp_path: Path, program: str, timeout: float = 20.0) -> dict[str, object]:
    """What is kept of a cell whose process runs ``program``."""
    return rounds.run_cell(
        [sys.executable, "-c", program], tmp_path / "out.json", tmp_path / "stderr.txt", timeout
    )


def gone(pid: int) -> bool:
    """Whether a process has ended, its parent having asked for that or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in {"Z", "X"}


def test_a_cell_that_died_gives_its_error_or_how_it_ended(tmp_path: Path) -> None:
    assert run_cell(tmp_path, "raise ValueError('odd')") == {"reason": "failed: ValueError: odd"}
    killed = "import os; os.kill(os.getpid(), 9)"
    assert run_cell(tmp_path, killed) == {"reason": "failed: ended with status -9"}


def test_a_cell_ends_with_its_children_and_does_not_wait_for_them(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, time\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.setpgid(0, 0)\n"
        "    time.sleep(60)\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child))\n"
    )
    out = f"pathlib.Path({str(tmp_path / 'out.json')!r}).write_text('{{}}')\n"
    assert run_cell(tmp_path, program + out) == {}
    assert gone(int((tmp_path / "child").read_text()))
    assert run_cell(tmp_path, program + "time.sleep(60)", timeout=2.0) == {
        "reason": "did not end within 2 s"
    }
    assert gone(int((tmp_path / "child").read_text()))


def test_only_the_session_is_ended() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        subprocess.Popen(sleep, start_new_session=True) as mine,
        subprocess.Popen(sleep, start_new_session=True) as other,
    ):
        end_session(mine.pid)
        assert mine.wait() == -signal.SIGKILL
        assert other.poll() is None
        os.kill(other.pid, signal.SIGKILL)


def test_the_time_of_each_round_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "run_cell", lambda *args: {"reason": "not today"})
    told: list[str] = []
    cells = rounds.run_rounds(["footprint"], 2, Effort(quick=True), told.append)
    assert [(found.round, found.reason) for found in cells] == [(0, "not today"), (1, "not today")]
    assert told[1::2] == ["round 1 of 2 took 0 min 0 s", "round 2 of 2 took 0 min 0 s"]


def test_each_tick_that_a_blocked_loop_misses_counts_from_when_it_was_due(
    loop_runner: LoopRunner,
) -> None:
    async def main() -> list[float]:
        asyncio.get_running_loop().call_later(0.02, time.sleep, 0.1)
        return await lag.of_event(0.2)

    lags = loop_runner(main())
    assert max(lags) > 90
    assert all(late >= 0 for late in lags)
    # Later by one tick each, as they were due: 2 ms. A slow machine adds to them, and takes none.
    missed = lags[lags.index(max(lags)) :][:40]
    assert len(missed) == 40
    assert all(before - after == pytest.approx(2, abs=1e-6) for before, after in pairwise(missed))


def test_memory_is_made_ready_and_given_back() -> None:
    size = 64 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = resident_bytes()
    make_ready(size)
    assert resident_bytes() - held < size / 2
    huge_page = 2 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before >= size / huge_page


class Several(footprint.Footprint):
    """One contender in three processes."""

    contenders = ("django",)
    processes = 3


@pytest.mark.parametrize("failing", [False, True])
def test_of_several_processes_the_median_counts_if_all_have_figures(
    failing: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "load", lambda _: Several())
    answers: list[dict[str, Any]] = [{"figures": {"import": each}} for each in (9.0, 1.0, 2.0)]
    if failing:
        answers[1] = {"reason": "not today"}
    left = iter(answers)
    monkeypatch.setattr(rounds, "run_cell", lambda *_: next(left))
    [found] = rounds.run_rounds(["footprint"], 1, Effort(quick=False), lambda _: None)
    expected = ({}, "not today") if failing else ({"import": 2.0}, None)
    assert (found.figures, found.reason) == expected
