"""``pools`` and processes: exit, fork, and the inside of a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leasepool_django import run_in_pool_sync
from tests.django_jobs import double
from tests.process_pools import ALL_WARNINGS

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

ROOT = Path(__file__).parents[1]


def script(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with Django set up, and ``pools`` and some jobs imported."""
    head = (
        "import os, sys, threading, asyncio\n"
        "import django\n"
        "from leasepool_django import *\n"
        "from tests.django_jobs import *\n"
        "if __name__ == '__main__':\n"
        "    django.setup()\n"
    )
    body = "".join(f"    {line}\n" for line in text.strip().splitlines())
    return subprocess.run(
        [sys.executable, "-c", head + body],
        cwd=ROOT,
        env={
            **os.environ,
            **ALL_WARNINGS,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_what_runs_at_exit_is_stopped() -> None:
    ran = script("print(run_in_pool_sync(double, 21))")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "42\n", "")


def test_an_exit_does_not_wait_for_a_busy_worker() -> None:
    ran = script(
        "call = threading.Thread(target=lambda: run_in_pool_sync(through_time), daemon=True)\n"
        "call.start()\n"
        "while not pools['default'].started or not pools['default'].stats().busy_workers: pass\n"
        "print('end')\n"
    )
    assert (ran.returncode, ran.stdout) == (0, "end\n"), ran.stderr


def test_after_a_fork_the_child_has_workers_of_its_own() -> None:
    ran = script(
        """
print(run_in_pool_sync(os.getppid) > 0)
manager = pools["default"]
mine = {worker.pid for pool in manager.stats().pools for worker in pool.workers}
sys.stdout.flush()
child = os.fork()
if not child:
    code = 3
    try:
        assert not pools["default"].started
        assert run_in_pool_sync(double, 4) == 8
        stats = pools["default"].stats()
        theirs = {worker.pid for pool in stats.pools for worker in pool.workers}
        assert not mine & theirs - {None}, (mine, theirs)
        pools.stop_all_sync()
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
print(run_in_pool_sync(double, 5))
""",
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )
    assert (ran.returncode, ran.stdout) == (0, "True\n10\n"), ran.stderr


def test_after_a_fork_while_the_lock_is_held_the_child_is_not_stuck() -> None:
    ran = script(
        """
assert len(pools) == 2
with pools._lock:
    child = os.fork()
    if not child:
        code = 3
        try:
            code = 0 if run_in_pool_sync(double, 4) == 8 else 4
            pools.stop_all_sync()
        finally:
            os._exit(code)
assert os.waitpid(child, 0)[1] == 0
""",
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )
    assert ran.returncode == 0, ran.stderr


def test_an_app_that_uses_pools_when_it_is_ready_is_told_that_workers_are_made_ready_too(
    tmp_path: Path,
) -> None:
    (tmp_path / "hasty.py").write_text(
        "import django.apps\n"
        "class Hasty(django.apps.AppConfig):\n"
        "    name = 'hasty'\n"
        f"    path = {str(tmp_path)!r}\n"
        "    def ready(self):\n"
        "        from leasepool_django import pools\n"
        "        pools['default']\n"
    )
    (tmp_path / "hasty_settings.py").write_text(
        "from tests.settings import *\nINSTALLED_APPS = ['leasepool_django', 'hasty.Hasty']\n"
    )
    ran = script(
        """
try:
    run_in_pool_sync(double, 1)
except WorkerStartError as error:
    print(error)
""",
        DJANGO_SETTINGS_MODULE="hasty_settings",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
    )
    assert "AppConfig.ready() did it, which workers run too" in ran.stdout, ran.stderr


def test_pools_are_refused_inside_a_worker(settings: Settings) -> None:
    settings.LEASEPOOL = {"default": {"WORKERS_PER_POOL": 1}}
    with pytest.raises(Exception, match="inside a worker") as raised:
        run_in_pool_sync(run_in_pool_sync, double, 1)
    assert type(raised.value).__name__ == "LeasePoolError"
