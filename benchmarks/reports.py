"""``docs/benchmarks.md``, its plots and its data, from what was measured."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import OUT_OF_SCOPE
from .figures import Spread, Verdict, medians, verdicts
from .measuring import NO_LOOP
from .rounds import Cell, as_json
from .workloads import load

__all__ = ["DATA", "PAGE", "read", "save", "summary", "write"]

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "benchmarks.json"
PAGE = DOCS / "benchmarks.md"
PLOTS = DOCS / "benchmarks"

INTRODUCTION = """# Benchmarks

What this package costs beside what one would use instead, on the same work in the same run.

`make bench` measures and writes this page. Contenders take turns over several rounds, each in a
process of its own; a figure is the median over the rounds, with the lowest and the highest behind
it; a ratio is taken within each round. Every contender is set up as its own documentation shows it,
with two workers. Nothing is set that a user would not get by default. On a shared machine single
figures are noisy; look at the ratios.
"""


def save(cells: Sequence[Cell]) -> None:
    """Keep the measurements, in place of the former ones of the same groups."""
    groups = {cell.group for cell in cells}
    former = [cell for cell in read() if cell.group not in groups] if DATA.exists() else []
    data = {"machine": _machine(), "cells": as_json([*former, *cells])}
    DATA.write_text(json.dumps(data, indent=1) + "\n")


def read() -> list[Cell]:
    """The measurements that were kept last."""
    return [Cell(**cell) for cell in json.loads(DATA.read_text())["cells"]]


def _machine() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0))),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def summary(found: Sequence[Verdict]) -> list[str]:
    """The goals as a table in Markdown."""
    lines = [
        "| work | loop | ours | against | goal | measured | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for verdict in found:
        goal = verdict.goal
        group = load(goal.group)
        metric = next(metric for metric in group.metrics if metric.name == goal.metric)
        sign = "≥" if goal.at_least else "≤"
        if verdict.ratio is None:
            measured, reached = "not measured", "–"
        else:
            measured, reached = _text(verdict.ratio), "yes" if verdict.reached else "**no**"
        unit = f" {metric.unit}" if goal.reference is None else " ×"
        lines.append(
            f"| {group.title}: {metric.title} | {verdict.loop} | {group.title_of(goal.contender)} "
            f"| {verdict.versus or '–'} | {sign} {goal.limit:.3g}{unit} | {measured} | {reached} |"
        )
    return lines


def write() -> None:
    """Write the page and its plots from the data that was kept."""
    cells = read()
    machine = json.loads(DATA.read_text())["machine"]
    names = list(dict.fromkeys(cell.group for cell in cells))
    lines = [
        INTRODUCTION,
        (
            f"Measured on {machine['date']} with Python {machine['python']} on "
            f"{machine['system']}, {machine['cores']} cores, by `make bench`."
        ),
        "",
        "## Goals",
        "",
        *summary(verdicts(cells)),
    ]
    PLOTS.mkdir(exist_ok=True)
    for name in names:
        lines += ["", *_section(name, cells)]
    lines += ["", "## Not measured", ""]
    lines += [f"* {name}: {reason}" for name, reason in OUT_OF_SCOPE.items()]
    PAGE.write_text("\n".join(lines) + "\n")


def _section(name: str, cells: Sequence[Cell]) -> list[str]:
    group = load(name)
    found = medians(cells, name)
    titles = [f"{metric.title} ({metric.unit})" for metric in group.metrics]
    lines = [
        f"## {group.title}",
        "",
        group.work,
        "",
        f"| | loop | {' | '.join(titles)} |",
        f"|---|---|{'---|' * len(titles)}",
    ]
    reasons = []
    for (contender, loop), figures in found.items():
        title = group.title_of(contender)
        if isinstance(figures, str):
            reasons.append(f"{title}{'' if loop == NO_LOOP else f' on {loop}'}: {figures}")
            continue
        values = [_text(figures[m.name]) if m.name in figures else "–" for m in group.metrics]
        lines.append(f"| {title} | {loop} | {' | '.join(values)} |")
    if reasons:
        lines += ["", "Not measured:", "", *(f"* {reason}" for reason in dict.fromkeys(reasons))]
    if _plot(name, found):
        lines += ["", f"![{group.title}](benchmarks/{name}.svg)"]
    return lines


def _text(spread: Spread) -> str:
    return f"{spread.middle:.3g} ({spread.low:.3g}–{spread.high:.3g})"


def _plot(name: str, found: dict[tuple[str, str], Any]) -> bool:
    """Draw the group's first metric as bars; whether there was anything to draw."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "leasepool"
    from matplotlib import pyplot as plt

    group = load(name)
    metric = group.metrics[0]
    bars = [
        (f"{group.title_of(contender)}" + ("" if loop == NO_LOOP else f" · {loop}"), figures)
        for (contender, loop), figures in found.items()
        if isinstance(figures, dict) and metric.name in figures
    ]
    if not bars:
        return False
    bars.sort(key=lambda bar: bar[1][metric.name].middle, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(bars) + 1))
    axes.barh([title for title, _ in bars], [f[metric.name].middle for _, f in bars])
    axes.set_xlabel(f"{metric.title} ({metric.unit}), {metric.better} is better")
    axes.set_title(group.title)
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    return True
