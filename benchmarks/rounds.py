"""How often, and in which order: contenders take turns over several rounds.

Every cell (one contender, one group, one loop) runs in a process of its own, so that none disturbs
another, or in several where each can measure only once. What drifts on the machine meanwhile meets
all of them; ratios are taken within a round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .measuring import NO_LOOP, Effort
from .memory import make_ready
from .processes import end_session
from .reasons import of_output
from .workloads import Group, load

__all__ = ["Cell", "run_cell", "run_rounds"]

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cell:
    """What one process measured, or why it did not."""

    round: int
    group: str
    contender: str
    loop: str
    floor: bool
    figures: dict[str, float]
    reason: str | None = None


def run_rounds(
    names: Sequence[str], rounds: int, effort: Effort, tell: Callable[[str], None]
) -> list[Cell]:
    """Measure the groups ``names``, ``rounds`` times over."""
    cells = []
    for number in range(rounds):
        begin = time.monotonic()
        for name in names:
            group = load(name)
            for contender, loop, floor in _turns(group, effort, number):
                tell(f"round {number + 1} of {rounds}: {name}, {contender}, {loop}")
                cells.append(_measure(group, contender, loop, effort, number, floor=floor))
        minutes, seconds = divmod(round(time.monotonic() - begin), 60)
        tell(f"round {number + 1} of {rounds} took {minutes} min {seconds} s")
    return cells


def _turns(group: Group, effort: Effort, number: int) -> Iterator[tuple[str, str, bool]]:
    contenders = group.all_contenders(effort)
    start = number % len(contenders)
    for floor in group.floors:
        yield floor, NO_LOOP, True
    for contender in (*contenders[start:], *contenders[:start]):
        for loop in group.all_loops(effort):
            yield contender, loop, False


def _measure(
    group: Group, contender: str, loop: str, effort: Effort, number: int, *, floor: bool
) -> Cell:
    several: list[dict[str, float]] = []
    for _ in range(effort.pick(group.processes, 1)):
        with tempfile.TemporaryDirectory() as folder:
            out, said = Path(folder, "out.json"), Path(folder, "stderr.txt")
            spec = {
                "group": group.name,
                "contender": contender,
                "loop": loop,
                "quick": effort.quick,
                "floor": floor,
                "out": str(out),
            }
            command = [sys.executable, "-m", "benchmarks.cell", json.dumps(spec)]
            if group.memory:
                make_ready(group.memory)
            found = run_cell(command, out, said, group.timeout)
        if "figures" not in found:
            return Cell(number, group.name, contender, loop, floor, {}, found["reason"])
        several.append(found["figures"])
    figures = {metric: median(one[metric] for one in several) for metric in several[0]}
    return Cell(number, group.name, contender, loop, floor, figures)


def run_cell(command: Sequence[str], out: Path, said: Path, timeout: float) -> dict[str, Any]:
    """Run ``command``, which writes what it found to ``out``, for at most ``timeout`` seconds."""
    # A file, not a pipe: a pipe would not end before the last child that a cell leaves behind.
    with said.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return {"reason": f"did not end within {timeout:g} s"}
    finally:
        # Its children too.
        end_session(process.pid)
        process.wait()
    if not out.exists():
        told = of_output(said.read_text(errors="replace")) or f"ended with status {status}"
        return {"reason": f"failed: {told}"}
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _environment() -> dict[str, str]:
    # A server finds its modules compiled; whoever measures may have told Python not to keep that.
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def as_json(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """The cells as plain values."""
    return [asdict(cell) for cell in cells]
