"""Medians, ratios within a round, and their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .goals import GOALS, Goal
from .measuring import NO_LOOP, Better
from .rounds import Cell
from .workloads import load

__all__ = ["Spread", "Verdict", "medians", "verdicts"]


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
    """A goal on one loop: the ratio measured, ``None`` if it could not be."""

    goal: Goal
    loop: str
    ratio: Spread | None
    versus: str

    @property
    def reached(self) -> bool:
        """Whether the median reaches the goal."""
        return self.ratio is not None and self.goal.reached(self.ratio.middle)


def medians(cells: Sequence[Cell], group: str) -> dict[tuple[str, str], dict[str, Spread] | str]:
    """For each contender and loop: the spread of each metric, or the reason for none."""
    found: dict[tuple[str, str], dict[str, Spread] | str] = {}
    for cell in cells:
        if cell.group != group:
            continue
        key = (cell.contender, cell.loop)
        mine = [c for c in cells if (c.group, c.contender, c.loop) == (group, *key) and c.figures]
        if not mine:
            found[key] = cell.reason or "no figures"
            continue
        found[key] = {
            metric: Spread.of([c.figures[metric] for c in mine if metric in c.figures])
            for metric in mine[0].figures
        }
    return found


def verdicts(cells: Sequence[Cell]) -> list[Verdict]:
    """Judge every goal whose group was measured."""
    measured = {cell.group for cell in cells}
    found = []
    for goal in GOALS:
        if goal.group not in measured:
            continue
        loops = sorted({c.loop for c in cells if c.group == goal.group and not c.floor})
        found += [_judge(goal, loop, cells) for loop in loops if goal.loop in (None, loop)]
    return found


def _judge(goal: Goal, loop: str, cells: Sequence[Cell]) -> Verdict:
    better = next(m.better for m in load(goal.group).metrics if m.name == goal.metric)
    ratios = []
    versus = set()
    for number in sorted({cell.round for cell in cells}):
        here = {
            (c.contender, c.loop): c.figures[goal.metric]
            for c in cells
            if c.group == goal.group and c.round == number and goal.metric in c.figures
        }
        ours = here.get((goal.contender, loop))
        if ours is None:
            continue
        if goal.reference is None:
            ratios.append(ours)
            continue
        reference = goal.reference
        if reference == "best":
            peers = {
                name: here[name, loop]
                for name in load(goal.group).peers
                if (name, loop) in here and _keeps_up(goal, name, loop, cells, number)
            }
            if not peers:
                continue
            pick = max if better is Better.HIGHER else min
            reference = pick(peers, key=lambda name: peers[name])
            base = peers[reference]
        elif reference.startswith("floor:"):
            reference = reference.removeprefix("floor:")
            found = here.get((reference, NO_LOOP))
            if found is None:
                continue
            base = found
        else:
            found = here.get((reference, loop))
            if found is None:
                continue
            base = found
        versus.add(reference)
        ratios.append(ours / base)
    return Verdict(goal, loop, Spread.of(ratios) if ratios else None, ", ".join(sorted(versus)))


def _keeps_up(goal: Goal, peer: str, loop: str, cells: Sequence[Cell], number: int) -> bool:
    """Whether ``peer`` does so much of the work that the goal compares with it."""
    if goal.among is None:
        return True
    metric, share = goal.among
    done = {
        cell.contender: cell.figures[metric]
        for cell in cells
        if (cell.group, cell.loop, cell.round) == (goal.group, loop, number) and cell.figures
    }
    return peer in done and done[peer] >= share * done[goal.contender]
