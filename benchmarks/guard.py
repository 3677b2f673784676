"""``make bench-quick``: the ratios of a short run against those stored, never absolute times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .figures import Verdict, verdicts
from .measuring import Effort
from .rounds import run_rounds

__all__ = ["QUICK_GROUPS", "check", "store"]

BASELINE = Path(__file__).with_name("baseline.json")
QUICK_GROUPS = ("latency", "throughput", "payloads")
TOLERANCE = 1.25
TRIES = 3  # a noisy neighbour spoils one run, and hardly three


def _measure(tell: Callable[[str], None]) -> dict[str, tuple[Verdict, float]]:
    found = {}
    for verdict in verdicts(run_rounds(QUICK_GROUPS, 1, Effort(quick=True), tell)):
        # The best peer is not the same in every run, and a quick run has few peers.
        if verdict.ratio is not None and verdict.goal.reference != "best":
            found[f"{verdict.goal.key}@{verdict.loop}"] = (verdict, verdict.ratio.middle)
    return found


def store(tell: Callable[[str], None]) -> None:
    """Store this machine's ratios as what later runs are compared with."""
    ratios = {key: round(value, 4) for key, (_, value) in _measure(tell).items()}
    BASELINE.write_text(json.dumps(ratios, indent=1, sort_keys=True) + "\n")


def check(tell: Callable[[str], None]) -> bool:
    """Compare; false when a ratio is worse by more than a quarter in each of three tries."""
    if not BASELINE.exists():
        tell(f"There is no {BASELINE.name}: store this machine's ratios with --store-baseline.")
        return False
    baseline = json.loads(BASELINE.read_text())
    best: dict[str, float] = {}
    for _ in range(TRIES):
        worse = {}
        for key, (verdict, value) in _measure(tell).items():
            if key not in baseline:
                continue
            slower = baseline[key] / value if verdict.goal.at_least else value / baseline[key]
            best[key] = min(best.get(key, slower), slower)
            if best[key] > TOLERANCE:
                worse[key] = best[key]
        if not worse:
            for key, factor in sorted(best.items()):
                tell(f"{key}: {factor:.2f} times the stored ratio")
            return True
        tell(f"worse by more than {TOLERANCE - 1:.0%}: {', '.join(sorted(worse))}; once more")
    for key, factor in sorted(worse.items()):
        tell(f"{key}: {factor:.2f} times as slow as stored")
    return False
