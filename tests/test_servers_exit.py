"""The end of a process without a lifespan: executor threads that wait for a call do not hold it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUP = """
import atexit, django, time
from concurrent.futures import ThreadPoolExecutor
from leasepool_django import LeasePoolNotStartedError, pools, run_in_pool_sync
from tests.servers import jobs

def outcome(function, *args):
    try:
        print(type(run_in_pool_sync(function, *args)).__name__, flush=True)
    except LeasePoolNotStartedError as error:
        print(type(error).__name__, flush=True)

django.setup()
executor = ThreadPoolExecutor(1)
"""


def run(program: str, grace: float) -> tuple[str, float]:
    """What the program prints, and how many seconds it took. It must end well."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SETUP + program],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.servers.settings",
            "SERVERS_GRACE": str(grace),
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, time.monotonic() - began


def waits_for(function: str, mark: Path) -> str:
    return (
        f"executor.submit(outcome, {function}, {str(mark)!r})\n"
        "import pathlib\n"
        f"while not pathlib.Path({str(mark)!r}).exists(): time.sleep(0.01)\n"
    )


def test_a_call_that_takes_longer_than_the_grace_is_stopped(tmp_path: Path) -> None:
    printed, seconds = run(waits_for("jobs.spin", tmp_path / "mark"), grace=0.5)
    assert printed == "LeasePoolNotStartedError\n"
    assert 0.5 <= seconds < 30


@pytest.mark.parametrize("calls", [1, 3])
def test_threads_end_their_work_within_the_grace(tmp_path: Path, calls: int) -> None:
    program = "".join("executor.submit(outcome, jobs.double, 1)\n" for _ in range(calls))
    printed, _ = run(f"pools.start_all_sync()\n{program}", grace=20)
    assert printed == "tuple\n" * calls


def test_pools_may_be_looked_at_while_the_process_ends() -> None:
    printed, _ = run("atexit.register(lambda: print(pools['default'].started))", grace=1)
    assert printed == "False\n"
