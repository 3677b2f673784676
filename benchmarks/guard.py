"""``make bench-quick``: the ratios of a short run against those stored, never absolute times.

``make bench-baseline`` stores them. A figure that is missing on either side fails: what is not
compared is not guarded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .figures import Verdict, failures, verdicts
from .goals import GOALS, Goal
from .measuring import Effort
from .rounds import Cell, run_rounds
from .workloads import load

__all__ = ["QUICK_GROUPS", "check", "compared", "store"]

BASELINE = Path(__file__).with_name("baseline.json")
QUICK_GROUPS = ("latency", "throughput", "fairness", "payloads")
TOLERANCE = 1.25
TRIES = 3  # a noisy neighbour spoils one run, and hardly three
STORED_RUNS = 5

# In place of goals whose figure needs many peers, or says more about the machine. Tiny calls are
# compared with peers in Python, and not with bare pipes and sockets: what Python costs beside
# those, above all after a switch between processes, differs between machines by a factor of two. In
# flight that is anyio, which an event loop drives as well.
STANDING_IN = (
    *(Goal("latency", "p50", one, "stdlib", 1.0) for one in ("lease", "run", "django")),
    *(
        Goal("throughput", "calls", one, "anyio", 1.0, at_least=True)
        for one in ("lease", "run", "django")
    ),
    Goal("fairness", "of_ideal", "run", "floor:two bare processes", 1.04),
    *(
        Goal("payloads", metric, "run", "stdlib", 1.0)
        for metric in ("bytes_echo", "array_back", "array_kept")
    ),
)
QUICK = Effort(quick=True)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class _Run:
    """What one quick run gave: the ratios by key, and for other keys why they have none."""

    ratios: dict[str, float]
    reasons: dict[str, str]


def compared() -> dict[str, Goal]:
    """The goals that a quick run compares, by the key of their ratio on one loop.

    Those whose figure is in milliseconds or megabytes are left out: it says more about the machine.
    """
    found = {}
    replaced = {(goal.group, goal.metric) for goal in STANDING_IN}
    goals = [goal for goal in GOALS if (goal.group, goal.metric) not in replaced]
    for goal in (*goals, *STANDING_IN):
        if goal.group not in QUICK_GROUPS or not _is_ratio(goal):
            continue
        group = load(goal.group)
        reference = goal.reference
        takes_part = reference is None or reference.startswith("floor:") or reference in group.quick
        if goal.contender in group.quick and takes_part:
            for loop in group.all_loops(QUICK):
                if goal.loop in (None, loop):
                    found[_key(goal, loop)] = goal
    return found


def _is_ratio(goal: Goal) -> bool:
    if goal.reference is not None:
        return True
    return next(m.unit for m in load(goal.group).metrics if m.name == goal.metric) == "×"


def _key(goal: Goal, loop: str) -> str:
    return f"{goal.key}@{loop}"


def _measure(groups: Sequence[str], runs: int, tell: Tell) -> _Run:
    cells = run_rounds(groups, runs, QUICK, tell)
    goals = {key: goal for key, goal in compared().items() if goal.group in groups}
    judged = {
        _key(verdict.goal, verdict.loop): verdict
        for verdict in verdicts(cells, list(dict.fromkeys(goals.values())))
    }
    run = _Run({}, {})
    for key, goal in goals.items():
        verdict = judged.get(key)
        if verdict is None or verdict.ratio is None or verdict.missing:
            run.reasons[key] = _reason(verdict, goal.group, cells)
        else:
            run.ratios[key] = verdict.ratio.middle
    return run


def _reason(verdict: Verdict | None, group: str, cells: Sequence[Cell]) -> str:
    """Why a ratio is missing, as far as the cells of its group tell."""
    told = dict.fromkeys(f"{one.contender}: {one.reason}" for one in failures(cells, group))
    if told:
        return "; ".join(told)
    return "nothing to compare with" if verdict and not verdict.missing else "no figure"


def store(tell: Tell) -> bool:
    """Store the median ratios of five runs; false, and nothing stored, if one is missing."""
    run = _measure(QUICK_GROUPS, STORED_RUNS, tell)
    for key, reason in run.reasons.items():
        tell(f"{key} was not measured ({reason})")
    if run.reasons:
        tell("Nothing was stored.")
        return False
    ratios = {key: round(value, 4) for key, value in run.ratios.items()}
    BASELINE.write_text(json.dumps(ratios, indent=1, sort_keys=True) + "\n")
    return True


def check(tell: Tell) -> bool:
    """Compare; false when a ratio is worse by more than a quarter in each of three tries.

    Only the groups that were worse are tried again. False at once if what was measured is not what
    is stored.
    """
    baseline: dict[str, float] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if not baseline:
        tell(f"{BASELINE.name} holds no ratios: store this machine's (make bench-baseline).")
        return False
    goals = compared()
    if not _are_the_same(goals, baseline, tell):
        return False
    groups: Sequence[str] = QUICK_GROUPS
    best: dict[str, float] = {}
    for _ in range(TRIES):
        run = _measure(groups, 1, tell)
        for key, reason in run.reasons.items():
            tell(f"{key} was not measured ({reason})")
        if run.reasons:
            return False
        for key, value in run.ratios.items():
            stored = baseline[key]
            factor = stored / value if goals[key].at_least else value / stored
            best[key] = min(best.get(key, factor), factor)
        worse = sorted(key for key, factor in best.items() if factor > TOLERANCE)
        if not worse:
            for key, factor in sorted(best.items()):
                tell(f"{key}: {factor:.2f} times as slow as stored")
            return True
        groups = [name for name in QUICK_GROUPS if name in {goals[key].group for key in worse}]
        tell(f"worse by more than {TOLERANCE - 1:.0%}: {', '.join(worse)}")
    for key in worse:
        tell(f"{key}: {best[key]:.2f} times as slow as stored")
    return False


def _are_the_same(goals: dict[str, Goal], baseline: dict[str, float], tell: Tell) -> bool:
    """Whether a quick run measures just the ratios that are stored; says which differ."""
    for key in sorted(baseline.keys() - goals.keys()):
        tell(f"{key} is stored and not measured: store the ratios anew (make bench-baseline).")
    for key in sorted(goals.keys() - baseline.keys()):
        tell(f"{key} is measured and not stored: store the ratios anew (make bench-baseline).")
    return goals.keys() == baseline.keys()
