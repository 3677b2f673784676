"""``docs/benchmarks.md`` and its plots, from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .contenders import OUT_OF_SCOPE
from .figures import Failure, Spread, Verdict, failures, medians, verdicts
from .measuring import NO_LOOP
from .record import DATA, Record, read
from .rounds import Cell
from .workloads import load

__all__ = ["PAGE", "page", "summary", "tally", "write"]

PAGE = DATA.with_suffix(".md")
PLOTS = DATA.with_suffix("")

INTRODUCTION = """# Benchmarks

What this package costs beside what one would use instead, on the same work in the same run.

`make bench` measures and writes this page. Contenders take turns over several rounds, each in a
process of its own; a figure is the median over the rounds, with the lowest and the highest behind
it; a ratio is taken within each round. A goal is reached when the median reaches it and every round
gave a figure of this package. *Against*: whom the figure was compared with; for goals against the
best peer, those that were the best in some round. A light page's latency is compared only with
peers that answer at least 95 % as many requests that compute, for whoever does less disturbs less;
such a goal is reached, too, where there is no such peer. Every contender is set up as its own
documentation shows it, with the number of workers that the group names. Nothing is set that a user
would not get by default. On a shared machine single figures are noisy; look at the ratios. Groups
may be measured apart (`python -m benchmarks --only http`), each with all its contenders in one run:
then the others keep the figures they had. Machines of one name differ, too: where a table begins
with lines that are no contender's, they show what the machine itself could do that day.
"""


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
        unit = f" {metric.unit}" if goal.reference is None else " ×"
        against = "; ".join(map(group.title_of, verdict.versus)) or "–"
        reached = ("yes" if verdict.reached else "**no**") if verdict.judged else "–"
        lines.append(
            f"| {group.title}: {metric.title} | {verdict.loop} | {group.title_of(goal.contender)} "
            f"| {against} | {sign} {goal.limit:.3g}{unit} | {_measured(verdict)} | {reached} |"
        )
    return lines


def _measured(verdict: Verdict) -> str:
    if verdict.ratio is not None:
        said = _text(verdict.ratio)
    else:
        said = "no peer does as much of the work" if verdict.unrivalled else "not measured"
    return f"{said}; no figure in {_rounds(verdict.missing)}" if verdict.missing else said


def _rounds(numbers: Sequence[int]) -> str:
    """Rounds as readers count them, from 1."""
    word = "round" if len(numbers) == 1 else "rounds"
    return f"{word} {', '.join(str(number + 1) for number in numbers)}"


def tally(found: Sequence[Verdict]) -> str:
    """How many goals were reached, of how many."""
    reached = sum(verdict.reached for verdict in found)
    unknown = sum(not verdict.judged for verdict in found)
    said = f"{reached} of {len(found)} goals reached"
    return f"{said}, {unknown} not measured" if unknown else said


def write() -> None:
    """Write the page and its plots from the data that was kept."""
    records = read()
    if not records:
        raise FileNotFoundError(f"nothing was measured: {DATA} is made by `make bench`")
    PLOTS.mkdir(exist_ok=True)
    plotted = {name for name, record in records.items() if _plot(name, record.cells)}
    PAGE.write_text(page(records, plotted))


def page(records: Mapping[str, Record], plotted: set[str]) -> str:
    """The text of the page. ``plotted``: the groups that have a plot."""
    found = verdicts([cell for record in records.values() for cell in record.cells])
    circumstances = {record.circumstances for record in records.values()}
    alike = len(circumstances) == 1
    lines = [
        INTRODUCTION,
        circumstances.pop() if alike else "When and where each group was measured stands with it.",
        "",
        "## Goals",
        "",
        f"{tally(found)}.",
        "",
        *summary(found),
    ]
    for name, record in records.items():
        lines += ["", *_section(name, record, dated=not alike, plotted=name in plotted)]
    lines += ["", "## Versions", "", *_versions(records)]
    lines += ["", "## Out of scope", ""]
    lines += [f"* {name}: {reason}" for name, reason in OUT_OF_SCOPE.items()]
    return "\n".join(lines) + "\n"


def _section(name: str, record: Record, *, dated: bool, plotted: bool) -> list[str]:
    group = load(name)
    titles = [f"{metric.title} ({metric.unit})" for metric in group.metrics]
    lines = [f"## {group.title}", "", group.work, ""]
    if dated:
        lines += [record.circumstances, ""]
    lines += [f"| | loop | {' | '.join(titles)} |", f"|---|---|{'---|' * len(titles)}"]
    for (contender, loop), figures in medians(record.cells, name).items():
        values = [_text(figures[m.name]) if m.name in figures else "–" for m in group.metrics]
        lines.append(f"| {group.title_of(contender)} | {loop} | {' | '.join(values)} |")
    failed = failures(record.cells, name)
    if failed:
        lines += ["", "Not measured:", "", *(_failed(name, failure) for failure in failed)]
    if plotted:
        lines += ["", f"![{group.title}]({PLOTS.name}/{name}.svg)"]
    return lines


def _failed(name: str, failure: Failure) -> str:
    where = "" if failure.loop == NO_LOOP else f" on {failure.loop}"
    when = "" if failure.always else f", {_rounds(failure.rounds)}"
    return f"* {load(name).title_of(failure.contender)}{where}{when}: {failure.reason}"


def _versions(records: Mapping[str, Record]) -> list[str]:
    """A row for each distribution; with the groups, where they were not measured with the same."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, record in records.items():
        for distribution, version in record.versions.items():
            found.setdefault(distribution, {}).setdefault(version, []).append(name)
    lines = ["| distribution | version |", "|---|---|"]
    for distribution, versions in sorted(found.items(), key=lambda item: item[0].lower()):
        if len(versions) == 1:
            said = next(iter(versions))
        else:
            said = "; ".join(f"{one} ({', '.join(names)})" for one, names in versions.items())
        lines.append(f"| {distribution} | {said} |")
    return lines


def _text(spread: Spread) -> str:
    return f"{spread.middle:.3g} ({spread.low:.3g}–{spread.high:.3g})"


def _plot(name: str, cells: Sequence[Cell]) -> bool:
    """Draw the group's first metric as bars; whether there was anything to draw."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "leasepool"
    from matplotlib import pyplot as plt

    group = load(name)
    metric = group.metrics[0]
    bars = [
        (f"{group.title_of(contender)}" + ("" if loop == NO_LOOP else f" · {loop}"), figures)
        for (contender, loop), figures in medians(cells, name).items()
        if metric.name in figures
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
