"""``manage.py leasepool status``: what running processes say of their pools, and to whom."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import WorkerStartError, pools, run_in_pool_sync, status
from leasepool_django.handler import AliasManager
from leasepool_django.status import Answer, ask_all
from tests.django_jobs import double
from tests.managers import new_manager
from tests.process_pools import run_program
from tests.publishing import Project, new_project, saying
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's abstract sockets")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return new_project(tmp_path)


@pytest.fixture
def own_pools() -> Iterator[Callable[[], Answer | None]]:
    """This process's answer, if it gives one; other tests run at the same time."""

    def answer() -> Answer | None:
        found = ask_all("tests.settings")
        return next((answer for answer in found if answer.pid == os.getpid()), None)

    yield answer
    pools.reset()


# --- what is told -------------------------------------------------------------------------------


def test_a_process_tells_who_does_what(project: Project) -> None:
    with project.serving() as process:
        answer = project.answer()
        assert (answer.pid, answer.trouble) == (process.pid, "")
        assert answer.command == "server.py"  # its argument may be anything
        assert answer.directory == str(project.folder)
        assert list(answer.pools) == ["default", "reports"]  # and not the one that is kept secret
        assert answer.pools["reports"].state == "new"
        stats = answer.pools["default"]
        assert (stats.state, stats.busy_workers, stats.waiting) == ("running", 1, 1)
        ((worker,),) = [pool.workers for pool in stats.pools]
        assert worker.function == "tests.process_jobs.hold"
        assert worker.owner == "two\nlines"
        assert worker.pid == int((project.folder / "first").read_text())
        assert worker.seconds is not None
        assert 0 < worker.seconds < answer.age
        (lease,) = stats.leases
        assert (lease.workers, lease.running, lease.waiting) == (1, 1, 1)
        (project.folder / "go").touch()
        assert process.communicate(timeout=20)[0] == "served\n"
    assert ask_all(project.settings) == []


# --- from when to when --------------------------------------------------------------------------


def test_it_is_told_while_a_manager_runs(own_pools: Callable[[], Answer | None]) -> None:
    assert own_pools() is None
    assert run_in_pool_sync(double, 4) == 8
    answer = own_pools()
    assert answer is not None
    assert answer.pools["default"].calls_finished == 1
    pools["default"].stop_sync(grace=0)
    wait_until(lambda: own_pools() is None)
    assert run_in_pool_sync(double, 4) == 8
    assert own_pools() is not None
    pools.stop_all_sync(grace=0)
    wait_until(lambda: own_pools() is None)


def test_one_that_could_not_start_is_not_shown(
    settings: Any, own_pools: Callable[[], Answer | None]
) -> None:
    settings.LEASEPOOL = {
        "default": {"OPTIONS": {"initializer": "tests.django_jobs.refuse_to_start"}},
        "other": {"WORKERS_PER_POOL": 1},
    }
    with pytest.raises(WorkerStartError):
        pools["default"].start_sync()
    wait_until(lambda: own_pools() is None)
    pools["other"].start_sync()
    assert own_pools() is not None
    pools["default"].stop_sync()
    assert own_pools() is not None
    pools["other"].request_stop(grace=0)
    wait_until(lambda: own_pools() is None)


def test_what_goes_on_at_once_ends_as_it_should(
    settings: Any, own_pools: Callable[[], Answer | None]
) -> None:
    """Each of these starts and stops a manager, and the last to do so decides."""
    settings.LEASEPOOL = {name: {"BACKEND": "thread", "WORKERS_PER_POOL": 1} for name in "abc"}

    def come_and_go(name: str) -> None:
        for _ in range(30):
            pools[name].start_sync()
            pools[name].stop_sync(grace=0)

    with ThreadPoolExecutor() as threads:
        for _ in range(3):
            list(threads.map(come_and_go, "abc"))
            wait_until(lambda: own_pools() is None)
            list(threads.map(lambda name: pools[name].start_sync(), "abc"))
            answer = own_pools()
            assert answer is not None
            assert {stats.state for stats in answer.pools.values()} == {"running"}


def test_a_killed_process_is_gone(project: Project) -> None:
    with project.serving() as process:
        process.kill()
        process.wait(20)
        assert ask_all(project.settings) == []


def test_a_stopped_process_does_not_hold_up_the_others(project: Project) -> None:
    with project.serving() as process:
        process.send_signal(signal.SIGSTOP)
        try:
            answer = project.answer()
            done = project.status()
        finally:
            process.send_signal(signal.SIGCONT)
    assert (answer.pid, answer.trouble) == (process.pid, "did not answer within 2 s")
    assert done.returncode == 1
    assert done.stdout == f"(process {process.pid}, {answer.user}) did not answer within 2 s\n"
    assert done.stderr == "CommandError: No process told its state.\n"


FORKING = """
    import os, sys
    import django
    from leasepool_django import WorkerStartError, pools, run_in_pool_sync, status
    from leasepool_django.status import ask_all
    from tests.django_jobs import double
    from tests.waiting import wait_until

    if __name__ == "__main__":
        django.setup()
        project = os.environ["DJANGO_SETTINGS_MODULE"]
        run_in_pool_sync(double, 4)
        go, send = os.pipe()
        child = os.fork()
        if not child:
            os.read(go, 1)
            run_in_pool_sync(double, 4)
            print(*[answer.pid == os.getpid() for answer in ask_all(project)], flush=True)
            pools.stop_all_sync(grace=0)
            os._exit(0)
        pools.stop_all_sync(grace=0)
        wait_until(lambda: not ask_all(project))  # the child has no copy of the socket
        os.write(send, b"x")
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_answers_for_itself_alone(project: Project) -> None:
    ended = run_program(project.folder, FORKING, env=project.environment)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr


def test_it_need_not_be_told(settings: Any, own_pools: Callable[[], Answer | None]) -> None:
    settings.LEASEPOOL = {"default": {"WORKERS_PER_POOL": 1, "PUBLISH_STATUS": False}}
    assert run_in_pool_sync(double, 4) == 8
    assert own_pools() is None
    assert "leasepool-status" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("no more threads")]
)
def test_work_does_not_depend_on_being_seen(
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    own_pools: Callable[[], Answer | None],
) -> None:
    def refuse(self: threading.Thread) -> None:
        if self.name == "leasepool-status":
            raise error
        start(self)

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(pools.presence, "_warned", False)
    with caplog.at_level(logging.WARNING, "leasepool_django.presence"):
        assert run_in_pool_sync(double, 4) == 8
    assert caplog.text.count(f"will not show this process: {type(error).__name__}: ") == 1
    assert own_pools() is None


def test_an_error_in_a_snapshot_is_logged_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    own_pools: Callable[[], Answer | None],
) -> None:
    assert run_in_pool_sync(double, 4) == 8
    with monkeypatch.context() as broken:
        broken.setattr(AliasManager, "stats", lambda _: 1 / 0)
        assert own_pools() is None
    wait_until(lambda: "this process cannot tell its state" in caplog.text)
    assert own_pools() is not None


# --- to whom, and by whom -----------------------------------------------------------------------


AS_NOBODY = """
    import os, socket, sys
    import django
    from django.core.management import CommandError, call_command
    from leasepool_django import status
    from leasepool_django.management.commands import leasepool

    django.setup()
    os.setgroups([])
    os.setuid(65534)
    try:
        call_command("leasepool", "status", "--skip-checks")
    except CommandError as error:
        print(error)
    # And not because the command does not ask: the process itself sends nothing.
    prefix = "@" + status._prefix(os.environ["DJANGO_SETTINGS_MODULE"])
    with open("/proc/net/unix") as sockets:
        names = {line.split()[-1] for line in sockets}
    (name,) = [name for name in names if name.startswith(prefix)]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\\0" + name[1:])
        print(connection.recv(10))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_other_users_are_told_nothing(project: Project) -> None:
    with project.serving() as process:
        ended = run_program(project.folder, AS_NOBODY, env=project.environment)
    assert ended.stdout.splitlines() == [
        f"(process {process.pid}, root) tells only its own user and root",
        "No process told its state.",
        "b''",
    ], ended.stderr


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "{}",
        "[" * 100_000,
        '{"pools": {"default": {"state": "new"}}}',
        '{"pools": {"a": 5}}',
        '{"pools": {}, "command": "", "directory": "", "age": NaN}',
        '{"pools": {}, "command": "", "directory": "", "age": 1e400}',
        '{"pools": {}, "command": 5, "directory": "", "age": 1}',
        f'{{"pools": {{}}, "command": "", "directory": "", "age": 1{"0" * 400}}}',
    ],
    ids=range(10),
)
def test_another_version_is_not_guessed_at(text: str, project: Project) -> None:
    with saying(project, text):
        assert project.answer().trouble == (
            "tells its state as another version of leasepool-django does"
        )


def snapshot(**changes: Any) -> dict[str, Any]:
    """What a process says of a manager, with some of it changed."""
    stats = dataclasses.asdict(new_manager(1).stats())
    worker: dict[str, Any] = dict.fromkeys(("state", "function", "owner"), "x")
    worker |= {"pid": 5, "calls": 5, "seconds": 1.5}
    lease: dict[str, Any] = {
        "lease_id": "x",
        "owner": "x",
        "workers": 1,
        "running": 1,
        "waiting": 1,
    }
    lease |= {"age": 1, "expires_in": None}
    stats |= {"pools": [{"number": 1, "workers": [worker]}], "leases": [lease]}
    for name, value in changes.items():
        for part in (stats, worker, lease):
            if name in part:
                part[name] = value
    return {"command": "x", "directory": "/", "age": 1, "pools": {"default": stats}}


def test_what_is_not_of_its_type_is_not_shown(project: Project) -> None:
    with saying(project, json.dumps(snapshot())):
        assert project.answer().trouble == ""
    for name, value in [
        ("state", 5),
        ("pid", "\x1b[31m"),
        ("calls", True),
        ("busy_workers", "\x1b[31m"),
        ("waiting", 1 << 70),
        ("longest_wait", "x"),
        ("seconds", float("inf")),
        ("function", ["x"]),
        ("expires_in", "x"),
        ("owner", {}),
    ]:
        with saying(project, json.dumps(snapshot(**{name: value}))):
            assert "another version" in project.answer().trouble, name


def test_whoever_takes_a_name_does_not_hide_the_others(project: Project) -> None:
    """Names that no process of ours has, and many that say nothing."""
    prefix = b"\0" + status._prefix(project.settings).encode()
    with ExitStack() as opened, project.serving() as process:
        names = [prefix + b"\xff" * (107 - len(prefix)), prefix + b"\n" * 16, prefix + b"zz"]
        names += [prefix + b"%016x" % number for number in range(100)]
        for name in names:
            one = opened.enter_context(socket.socket(socket.AF_UNIX))
            one.bind(name)
            one.listen()
        before = time.monotonic()
        answers = ask_all(project.settings)
        assert time.monotonic() - before < 20  # and not two seconds for each
    assert len(answers) == 101
    assert [answer.pid for answer in answers if not answer.trouble] == [process.pid]


def test_more_than_anybody_has_to_say_is_not_read(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_MAX_ANSWER_BYTES", 1000)
    with saying(project, "x" * 100_000):
        assert project.answer().trouble == "says more than it could have to say"


def test_one_who_says_nothing_has_ended(project: Project) -> None:
    with saying(project, ""):
        assert ask_all(project.settings) == []
