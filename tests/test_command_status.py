"""What ``manage.py leasepool status`` prints, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from tests.process_pools import ROOT
from tests.publishing import Project, new_project, saying

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's abstract sockets")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return new_project(tmp_path)


def test_the_command_shows_it_for_people(project: Project) -> None:
    with project.serving() as process:
        done = project.status()
        assert (done.returncode, done.stderr) == (0, "")
        head, pool, columns, worker, lease, other = done.stdout.splitlines()
        assert head.startswith(f"server.py (process {process.pid}, ")
        assert "), for " in head
        assert ", in " not in head
        assert pool.startswith("  default: running; 1 of 1 worker busy; 1 waiting, the first for ")
        assert columns.split() == ["PID", "STATE", "CALLS", "SINCE", "FUNCTION", "(OWNER)"]
        pid, state, calls, _, unit, *rest = worker.split()
        assert (int(pid), state) == (int((project.folder / "first").read_text()), "busy")
        assert (calls, unit, rest) == ("0", "s", ["tests.process_jobs.hold", r"(two\nlines)"])
        assert lease.startswith(r"    lease of two\nlines: 1 worker, 1 busy, 1 waiting, for ")
        assert ", revoked in " in lease
        assert other == "  reports: not started"
        elsewhere = project.status("--pool", "reports", cwd=ROOT)
        assert f", in {project.folder}), for " in elsewhere.stdout
        assert elsewhere.stdout.splitlines()[1:] == ["  reports: not started"]


def test_the_command_shows_it_for_programs(project: Project) -> None:
    with project.serving() as process:
        done = project.status("--json")
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = done.stdout.splitlines()
        [said] = json.loads(line)
        assert set(said) == {"pid", "user", "command", "directory", "age", "pools"}
        assert said["pid"] == process.pid
        worker = said["pools"]["default"]["pools"][0]["workers"][0]
        assert worker["function"] == "tests.process_jobs.hold"


def test_nobody_there_is_said_with_status_1(project: Project) -> None:
    done = project.status()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"CommandError: No process with the settings '{project.settings}' uses its pools."
    )
    done = project.status("--json")
    assert (done.returncode, done.stdout) == (1, "[]\n")


def test_an_unknown_alias_is_a_mistake(project: Project) -> None:
    done = project.status("--pool", "report")
    assert done.returncode == 2
    assert "There is no pool alias 'report'." in done.stderr
    assert project.status("--watch", "0").returncode == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let children react to Ctrl-C also when this run is a background job, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_watching_ends_with_ctrl_c_and_shows_who_came(project: Project) -> None:
    with subprocess.Popen(
        project.command("--watch", "0.05"),
        env={**project.environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("No process with the settings")
        with project.serving():
            deadline = time.monotonic() + 20
            while not (line := watching.stdout.readline()).startswith("server.py ("):
                assert line, watching.communicate()
                assert time.monotonic() < deadline
        watching.send_signal(signal.SIGINT)
        rest, err = watching.communicate(timeout=20)
    assert (watching.returncode, err) == (0, ""), rest


def test_watching_on_a_terminal_draws_over_what_it_drew(project: Project) -> None:
    terminal, programs_end = pty.openpty()
    output = b""
    with subprocess.Popen(
        project.command("--watch=0.05"),
        env={**project.environment, "TERM": "xterm"},
        stdout=programs_end,
    ) as watching:
        os.close(programs_end)
        try:
            deadline = time.monotonic() + 20
            while output.count(b"\x1b[H\x1b[JNo process") < 2:
                assert select.select([terminal], [], [], deadline - time.monotonic())[0]
                output += os.read(terminal, 4096)
        finally:
            watching.terminate()
            watching.wait(20)
            os.close(terminal)


@pytest.mark.parametrize("options", [["--watch"], ["--watch", "--json"]])
def test_nobody_reading_ends_it_quietly(options: list[str], project: Project) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with subprocess.Popen(
            project.command(*options),
            env=project.environment,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            _, err = process.communicate(timeout=20)
    finally:
        os.close(writing)
    assert (process.returncode, err) == (141, "")


def test_another_platform_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CommandError, match="can be seen on Linux only"):
        call_command("leasepool", "status")


def test_what_a_process_says_cannot_command_the_terminal(project: Project) -> None:
    said = {"command": "\x1b[2Jweb\nprocess", "directory": "/\x07", "age": 1e6, "pools": {}}
    with saying(project, json.dumps(said)):
        done = project.status()
    assert done.returncode == 0
    head, rest = done.stdout.splitlines()
    assert head.startswith(r"\x1b[2Jweb\nprocess (process ")
    assert head.endswith(r", in /\x07), for 11 d 13 h")
    assert rest == "  shows no pool"
