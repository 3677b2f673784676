"""``python -m benchmarks``: measure, report, or compare with what is stored; see ``--help``."""

from __future__ import annotations

import argparse
import sys

from . import guard, record, reports
from .figures import verdicts
from .measuring import Effort
from .rounds import run_rounds
from .workloads import NAMES


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Do what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="compare with the stored ratios")
    parser.add_argument("--store-baseline", action="store_true", help="store the ratios")
    parser.add_argument("--report", action="store_true", help="write docs/benchmarks.md")
    parser.add_argument("--only", action="append", choices=NAMES, help="this group (repeatable)")
    parser.add_argument("--rounds", type=int, default=3, help="how often (default: 3)")
    options = parser.parse_args()
    if options.report:
        reports.write()
        return 0
    if options.store_baseline:
        return 0 if guard.store(tell) else 1
    if options.quick:
        return 0 if guard.check(tell) else 1
    cells = run_rounds(options.only or NAMES, options.rounds, Effort(), tell)
    record.save(cells)
    found = verdicts(cells)
    # A goal that is missed is a result, not an error.
    print("\n".join([*reports.summary(found), "", reports.tally(found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
