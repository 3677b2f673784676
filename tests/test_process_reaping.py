"""The fork server is the workers' reaper, and kills what they leave behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import process_jobs as jobs
from tests.process_pools import assert_full_capacity, running
from tests.process_table import identify, wait_gone

# Looks at the leader of each group that is killed.
WATCHING = """
import os, pathlib

killpg = os.killpg

def watched(group, number):
    state = pathlib.Path(f"/proc/{{group}}/stat").read_text().rpartition(")")[2].split()[0]
    with open({path!r}, "a") as file:
        print(group, state, file=file)
    killpg(group, number)

os.killpg = watched
"""


def test_the_group_of_a_worker_is_killed_while_its_number_cannot_be_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dead, and not reaped yet."""
    path = tmp_path / "groups"
    (tmp_path / "watching.py").write_text(WATCHING.format(path=str(path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    with running(2, preload=["watching"]) as manager:
        killed, *started = map(identify, manager.run_sync(jobs.start_and_return))
        os.kill(killed.pid, signal.SIGKILL)
        wait_gone(started, timeout=5)
        assert_full_capacity(manager, tmp_path)
    lines = path.read_text().splitlines()
    assert lines[0] == f"{killed.pid} Z"
    assert len(lines) == 3
    assert {line.split()[1] for line in lines} == {"Z"}


def test_where_nobody_can_be_looked_at_before_it_is_reaped_ends_are_noticed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, which has had no waitid() for long."""
    (tmp_path / "without_waitid.py").write_text("import os; del os.waitid")
    monkeypatch.syspath_prepend(str(tmp_path))
    with running(2, preload=["without_waitid"]) as manager:
        killed, *started = map(identify, manager.run_sync(jobs.start_and_return))
        os.kill(killed.pid, signal.SIGKILL)
        wait_gone(started, timeout=5)
        assert_full_capacity(manager, tmp_path)
        assert manager.stats().workers_crashed == 1
