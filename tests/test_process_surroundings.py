"""What a function finds in its worker: a process of its own kind, with what it was given."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import WorkerCrashedError
from leasepool_django.backends.process.control import HUGE_PAGES
from leasepool_django.backends.process.system import TUNABLES
from leasepool_django.backends.process.worker import TIME_SLICE
from tests import process_jobs as jobs
from tests.process_pools import running
from tests.process_table import fork_servers
from tests.waiting import wait_until

each_method = pytest.mark.parametrize("method", ["forkserver", "spawn"])


@each_method
def test_a_worker_leads_a_group_of_its_own_in_this_session(method: str) -> None:
    """A group, so that all of it can be killed; this session, so that ``nice`` has an effect."""
    with running(mp_context=method) as manager:
        found = manager.run_sync(jobs.describe)
        assert found["group"] == found["pid"]
        assert found["session"] == os.getsid(0)
        assert [found["parent"]] == fork_servers()
        assert os.getpgid(found["parent"]) == found["parent"]
        assert found["threads"] == 1


@each_method
@pytest.mark.parametrize(
    ("options", "nicer", "policy"),
    [
        ({}, 0, os.SCHED_OTHER),
        ({"nice": 0, "scheduling": "normal"}, 0, os.SCHED_OTHER),
        ({"nice": 7}, 7, os.SCHED_OTHER),
        ({"scheduling": "idle"}, 0, os.SCHED_IDLE),
        ({"nice": 3, "scheduling": "idle"}, 3, os.SCHED_IDLE),
    ],
)
def test_workers_give_way_as_much_as_was_asked_for(
    options: dict[str, Any], nicer: int, policy: int, method: str
) -> None:
    here = os.getpriority(os.PRIO_PROCESS, 0)
    with running(mp_context=method, **options) as manager:
        found = manager.run_sync(jobs.describe)
    assert found["nice"] == min(19, here + nicer)
    assert found["policy"] == policy


@each_method
@pytest.mark.parametrize("own", [None, "glibc.malloc.perturb=7", "glibc.malloc.hugetlb=0"])
def test_functions_and_what_they_start_have_the_server_s_settings_of_the_c_library(
    own: str | None, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork server has one of its own, unless the server says otherwise."""
    if own is None:
        monkeypatch.delenv(TUNABLES, raising=False)
    else:
        monkeypatch.setenv(TUNABLES, own)
    with running(mp_context=method) as manager:
        assert manager.run_sync(jobs.environment, TUNABLES) == own
        started = manager.run_sync(jobs.run_command, ["sh", "-c", f"echo ${TUNABLES}"])
        assert started == (own or "")
        [server] = fork_servers()
        # Where glibc has found one of its settings, it has put zeros between them.
        given = Path(f"/proc/{server}/environ").read_text().replace("\0", ":")
    expected = {None: HUGE_PAGES, "glibc.malloc.perturb=7": f"{own}:{HUGE_PAGES}"}.get(own, own)
    assert f":{TUNABLES}={expected}:" in f":{given}"


@each_method
@pytest.mark.skipif(
    jobs.time_slice() == 0, reason="the kernel does not tell time slices: it is older than 6.12"
)
@pytest.mark.parametrize("options", [{}, {"nice": 7}])
def test_workers_can_be_interrupted_whenever_the_server_wakes(
    options: dict[str, Any], method: str
) -> None:
    with running(mp_context=method, **options) as manager:
        assert manager.run_sync(jobs.time_slice) == TIME_SLICE > jobs.time_slice()
        assert manager.run_sync(jobs.describe)["policy"] == os.SCHED_OTHER


@each_method
def test_when_memory_runs_out_workers_are_killed_before_this_process(method: str) -> None:
    with running(mp_context=method) as manager:
        assert manager.run_sync(jobs.oom_score) == min(1000, jobs.oom_score() + 300)


def test_a_worker_is_replaced_after_its_last_call() -> None:
    with running(max_tasks_per_child=3) as manager:
        found = [manager.run_sync(jobs.count_up) for _ in range(7)]
        assert found == [1, 2, 3, 1, 2, 3, 1]
        with manager.lease_sync() as lease:
            found = [lease.run_sync(jobs.count_up) for _ in range(5)]
        assert found == [2, 3, 1, 2, 3]
        stats = manager.stats()
        assert stats.workers_crashed == stats.workers_killed == 0


def test_a_worker_that_may_run_one_call_still_says_how_it_failed() -> None:
    with running(max_tasks_per_child=1) as manager:
        for _ in range(3):
            with pytest.raises(jobs.OddError):
                manager.run_sync(jobs.raise_odd)
            with pytest.raises(WorkerCrashedError):
                manager.run_sync(jobs.kill_own_process)


def test_workers_draw_different_random_numbers() -> None:
    """Though all of them come from one process that had drawn some already."""
    with running(3, preload=["random"], max_tasks_per_child=1) as manager:
        drawn = [manager.run_sync(jobs.draw) for _ in range(6)]
    assert len(set(drawn)) == 6


def test_what_a_function_prints_before_a_kill_is_not_lost(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with running() as manager:
        with pytest.raises(WorkerCrashedError):
            manager.run_sync(jobs.print_and_die, "last words")
        assert capfd.readouterr().out == "last words\n"


def test_functions_have_no_standard_input() -> None:
    with running() as manager:
        assert manager.run_sync(jobs.read_stdin) == ""


@each_method
def test_programs_started_by_a_function_obey_signals(method: str) -> None:
    """Though the worker itself leaves it to the server when to end, and whatever this one does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with running(mp_context=method) as manager:
            blocked, ignored = manager.run_sync(jobs.signals_of_a_child)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        signal.signal(signal.SIGHUP, before)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1):
        assert not ignored >> (number - 1) & 1, number
        assert not blocked >> (number - 1) & 1, number


@each_method
def test_a_function_may_start_programs_and_wait_for_them(method: str) -> None:
    """Also where this process leaves its children to the kernel."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with running(mp_context=method) as manager:
            assert manager.run_sync(jobs.run_program, "exit 7") == 7
            # Its end as a process is noticed as ever.
            with pytest.raises(WorkerCrashedError) as caught:
                manager.run_sync(jobs.exit_at_once, 3)
            assert caught.value.exitcode == 3
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_cannot_look_up_its_memory_lives_on(tmp_path: Path) -> None:
    """A function may use up all descriptors, and ``max_rss_per_child`` needs one."""
    with running(max_rss_per_child=1 << 40) as manager:
        pid = manager.run_sync(os.getpid)
        assert manager.run_sync(jobs.use_up_descriptors) > 0
        assert manager.run_sync(os.getpid) == pid
        wait_until(lambda: manager.stats().idle_workers == 1)
