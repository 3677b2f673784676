"""Medians, ratios within a round, and their spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .goals import GOALS, Goal
from .measuring import NO_LOOP, Better
from .rounds import Cell
from .workloads import load

__all__ = ["Failure", "Spread", "Verdict", "failures", "medians", "verdicts"]


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, and the extremes."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum ``values`` up; there is at least one."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Verdict:
    """A goal on one loop: the ratio measured, ``None`` if it could not be.

    ``versus``: whom it was compared with, in one round or another. ``missing``: the rounds, from
    0, that gave no figure of this package.
    """

    goal: Goal
    loop: str
    ratio: Spread | None
    versus: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()
    unrivalled: bool = False  # all peers were measured, and none ever did enough of the work

    @property
    def reached(self) -> bool:
        """Whether the median reaches the goal, and every round gave a figure of this package.

        Or whether there is nobody to compare with, as no peer does as much of the work.
        """
        if self.missing:
            return False
        return self.unrivalled if self.ratio is None else self.goal.reached(self.ratio.middle)

    @property
    def judged(self) -> bool:
        """Whether it can be said; not where only what the goal compares with is missing."""
        return bool(self.missing) or self.ratio is not None or self.unrivalled


@dataclass(frozen=True)
class Failure:
    """Why one contender on one loop gave no figures in ``rounds``; ``always``: in no round."""

    contender: str
    loop: str
    rounds: tuple[int, ...]
    always: bool
    reason: str


def medians(cells: Sequence[Cell], group: str) -> dict[tuple[str, str], dict[str, Spread]]:
    """For each contender and loop that gave figures: the spread of each metric."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for cell in cells:
        if cell.group == group and cell.figures:
            mine = found.setdefault((cell.contender, cell.loop), {})
            for metric, value in cell.figures.items():
                mine.setdefault(metric, []).append(value)
    return {
        key: {metric: Spread.of(values) for metric, values in mine.items()}
        for key, mine in found.items()
    }


def failures(cells: Sequence[Cell], group: str) -> list[Failure]:
    """What gave no figures, in some round or in all of them."""
    asked: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, str, str], list[int]] = {}
    for cell in cells:
        if cell.group != group:
            continue
        asked[cell.contender, cell.loop] += 1
        if not cell.figures:
            key = (cell.contender, cell.loop, cell.reason or "no figures")
            found.setdefault(key, []).append(cell.round)
    return [
        Failure(contender, loop, tuple(rounds), len(rounds) == asked[contender, loop], reason)
        for (contender, loop, reason), rounds in found.items()
    ]


def verdicts(cells: Sequence[Cell], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Judge every one of ``goals`` whose group was measured."""
    measured = {cell.group for cell in cells}
    found = []
    for goal in goals:
        if goal.group not in measured:
            continue
        loops = sorted({c.loop for c in cells if c.group == goal.group and not c.floor})
        found += [_judge(goal, loop, cells) for loop in loops if goal.loop in (None, loop)]
    return found


Round = dict[tuple[str, str], dict[str, float]]


def _judge(goal: Goal, loop: str, cells: Sequence[Cell]) -> Verdict:
    ratios = []
    missing = []
    versus = set()
    outdone = True  # every peer, in each round
    mine = [cell for cell in cells if cell.group == goal.group]
    for number in sorted({cell.round for cell in mine}):
        here = {(c.contender, c.loop): c.figures for c in mine if c.round == number}
        ours = here.get((goal.contender, loop), {}).get(goal.metric)
        if ours is None:
            missing.append(number)
        elif goal.reference is None:
            ratios.append(ours)
        elif (key := _reference(goal, loop, here)) is not None:
            versus.add(key[0])
            ratios.append(ours / here[key][goal.metric])
        elif goal.among is not None:
            peers = load(goal.group).peers
            outdone = outdone and all(goal.metric in here.get((name, loop), {}) for name in peers)
        else:
            outdone = False
    return Verdict(
        goal,
        loop,
        Spread.of(ratios) if ratios else None,
        tuple(sorted(versus)),
        tuple(missing),
        outdone and not ratios and not missing,
    )


def _reference(goal: Goal, loop: str, here: Round) -> tuple[str, str] | None:
    """What one round compares with, and its loop; ``None`` if that was not measured."""
    if goal.reference == "best":
        group = load(goal.group)
        peers = [
            (name, loop)
            for name in group.peers
            if goal.metric in here.get((name, loop), {}) and _keeps_up(goal, name, loop, here)
        ]
        if not peers:
            return None
        better = next(m.better for m in group.metrics if m.name == goal.metric)
        pick = max if better is Better.HIGHER else min
        return pick(peers, key=lambda key: here[key][goal.metric])
    name = goal.reference or ""
    floor = name.startswith("floor:")
    key = (name.removeprefix("floor:"), NO_LOOP if floor else loop)
    return key if goal.metric in here.get(key, {}) else None


def _keeps_up(goal: Goal, peer: str, loop: str, here: Round) -> bool:
    """Whether ``peer`` does so much of the work that the goal compares with it."""
    if goal.among is None:
        return True
    metric, share = goal.among
    ours, its = (here[name, loop].get(metric, 0.0) for name in (goal.contender, peer))
    return its >= share * ours
