"""``python -m tests.chaos [--seconds 60] [--seed N]``: harm done to a busy manager, and the proof.

Prints the seed, what was asked for and what came of it, and ends with status 1 if any promise was
broken. ``--context spawn`` has workers spawned instead of forked. ``--soak`` does no harm and makes
``--calls`` calls of all sizes instead. ``--min-calls`` and ``--min-kills`` say how much there must
have been of both.
"""

from __future__ import annotations

import argparse
import faulthandler
import secrets
import sys

LONGEST_SECONDS = 1800  # beyond which a run that does not end shows its stacks and dies


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", help="of an earlier run, to have the same calls and signals")
    parser.add_argument("--context", choices=["forkserver", "spawn"], default="forkserver")
    parser.add_argument("--min-calls", type=int, default=0)
    parser.add_argument("--min-kills", type=int, default=0)
    given = parser.parse_args()
    from tests import leaks
    from tests.chaos.run import Plan, run, soak
    from tests.chaos.watch import steady_memory

    steady_memory()
    leaks.mark_children()
    seed = given.seed or secrets.token_hex(4)
    print(f"seed {seed}", flush=True)  # noqa: T201 - a program
    longest = LONGEST_SECONDS if given.soak else given.seconds * 2 + LONGEST_SECONDS / 6
    faulthandler.dump_traceback_later(longest, exit=True)
    if given.soak:
        plan = soak(seed, given.calls)
    else:
        plan = Plan(seed, given.seconds, context=given.context)
    report = run(plan)
    faulthandler.cancel_dump_traceback_later()
    print("\n".join(report.lines()))  # noqa: T201
    wrong = list(report.wrong)
    if report.calls < given.min_calls:
        wrong.append(f"only {report.calls} calls were made; {given.min_calls} were to be")
    if report.kills < given.min_kills:
        wrong.append(f"only {report.kills} kills; {given.min_kills} were to be")
    print("\n".join(["BROKEN:", *wrong]) if wrong else "every promise was kept")  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
