"""How the benchmarks judge what they have measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import guard
from benchmarks.figures import Verdict, verdicts
from benchmarks.goals import GOALS
from benchmarks.measuring import Effort
from benchmarks.rounds import Cell
from benchmarks.workloads import NAMES, load


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
    assert found.versus == "anyio, pebble"


def test_a_peer_that_does_less_work_is_not_compared_with() -> None:
    cells = [
        cell("http", "django", requests=1000.0, light_p99=4.0),
        cell("http", "anyio", requests=960.0, light_p99=10.0),
        cell("http", "leasepool", requests=500.0, light_p99=1.0),
    ]
    found = verdict(cells, "http.light_p99.django/best")
    assert found.ratio is not None
    assert (found.ratio.middle, found.versus, found.reached) == (0.4, "anyio", True)


def test_a_cold_start_is_not_compared_with_a_fork_of_the_server() -> None:
    assert "stdlib" in load("start").contenders
    assert "stdlib" not in load("start").peers


def test_what_was_not_measured_is_not_reached() -> None:
    found = verdict(
        [cell("http", "anyio", requests=1.0, light_p99=1.0)], "http.requests.django/best"
    )
    assert found.ratio is None
    assert not found.reached


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Throughputs that the guard measures, one after the other; 100 is what is stored."""
    queue: list[float] = []

    def run_rounds(names: object, rounds: int, effort: Effort, tell: object) -> list[Cell]:
        assert effort.quick
        return [
            cell("throughput", "run", calls=queue.pop(0)),
            cell("throughput", "stdlib", calls=10.0),
        ]

    monkeypatch.setattr(guard, "run_rounds", run_rounds)
    monkeypatch.setattr(guard, "BASELINE", tmp_path / "baseline.json")
    queue.append(100.0)
    guard.store(lambda text: None)
    stored = json.loads((tmp_path / "baseline.json").read_text())
    assert stored == {"throughput.calls.run/stdlib@asyncio": 10.0}
    return queue


def test_the_guard_lets_what_is_as_fast_pass(measured: list[float]) -> None:
    measured += [81.0]
    assert guard.check(lambda text: None)


def test_the_guard_fails_what_is_slower_each_time(measured: list[float]) -> None:
    measured += [79.0, 60.0, 79.0]
    told: list[str] = []
    assert not guard.check(told.append)
    assert told[-1] == "throughput.calls.run/stdlib@asyncio: 1.27 times as slow as stored"


def test_the_guard_does_not_take_one_slow_run_for_a_slow_change(measured: list[float]) -> None:
    measured += [50.0, 95.0]
    assert guard.check(lambda text: None)


def test_the_guard_needs_something_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BASELINE", tmp_path / "baseline.json")
    told: list[str] = []
    assert not guard.check(told.append)
    assert "--store-baseline" in told[0]
