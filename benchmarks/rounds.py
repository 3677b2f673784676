"""How often, and in which order: contenders take turns over several rounds.

Every cell (one contender, one group, one loop) runs in a process of its own, so that none disturbs
another. What drifts on the machine meanwhile meets all of them; ratios are taken within a round.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .measuring import NO_LOOP, Effort
from .workloads import Group, load

__all__ = ["Cell", "run_rounds"]

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
        for name in names:
            group = load(name)
            for contender, loop, floor in _turns(group, effort, number):
                tell(f"round {number + 1} of {rounds}: {name}, {contender}, {loop}")
                cells.append(_measure(group, contender, loop, effort, number, floor=floor))
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
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        spec = {
            "group": group.name,
            "contender": contender,
            "loop": loop,
            "quick": effort.quick,
            "floor": floor,
            "out": str(out),
        }
        reason: str | None
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cell", json.dumps(spec)],
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(timeout=group.timeout)
            reason = None if out.exists() else f"failed: {_last_line(errors)}"
        except subprocess.TimeoutExpired:
            reason = f"did not end within {group.timeout:g} s"
        finally:
            # Its children too, which some contenders leave behind.
            _kill_session(process)
        found: dict[str, Any] = {"reason": reason}
        if reason is None:
            found = json.loads(out.read_text())
    return Cell(
        number, group.name, contender, loop, floor, found.get("figures", {}), found.get("reason")
    )


def _environment() -> dict[str, str]:
    # A server finds its modules compiled; whoever measures may have told Python not to keep that.
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def _kill_session(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody is left
    process.wait()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def as_json(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """The cells as plain values."""
    return [asdict(cell) for cell in cells]
