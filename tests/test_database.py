"""Workers and databases: those of a test run, and one that is started anew under way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError

from leasepool_django import LeasedExecutorManager
from leasepool_django.backends.process import django_worker
from tests.managers import running
from tests.postgres import Server, new_server

ROOT = Path(__file__).parents[1]
JOBS = "tests.database_project.jobs"

RUNNERS = {
    "django": ["-m", "django", "test", "--no-color"],
    "django-parallel": ["-m", "django", "test", "--no-color", "--parallel", "2"],
    # Without this project's own fixtures: what a user of pytest-django has.
    "pytest": ["-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:randomly"],
}


def run_tests(runner: str, module: str, **databases: dict[str, Any]) -> str:
    """Let a test runner run a module of ``database_project``; its output, if nothing failed."""
    name = f"tests.database_project.{module}"
    if runner == "pytest":
        name = str(ROOT / "tests" / "database_project" / f"{module}.py")
    ran = subprocess.run(
        [sys.executable, "-W", "error", *RUNNERS[runner], name],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.database_project.settings",
            "PYTEST_ADDOPTS": "--ds=tests.database_project.settings",
            "LEASEPOOL_TESTS_DATABASES": json.dumps(databases),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert "ran 0 tests" not in ran.stdout.lower()
    return ran.stdout


def sqlite(folder: Path, *, test: str | None = None) -> dict[str, Any]:
    """A project's SQLite database; ``test``: the file name of its test database, if it has one."""
    database: dict[str, Any] = {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(folder / "real.sqlite3"),
    }
    if test is not None:
        database["TEST"] = {"NAME": str(folder / test)}
    return database


# -- SQLite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", RUNNERS)
def test_workers_use_the_file_that_the_test_run_uses(tmp_path: Path, runner: str) -> None:
    run_tests(runner, "with_database", default=sqlite(tmp_path, test="test.sqlite3"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runner", ["django", "pytest"])
def test_a_database_in_memory_is_refused_and_inline_calls_use_it(
    tmp_path: Path, runner: str
) -> None:
    run_tests(runner, "in_memory", default=sqlite(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runner", ["django", "pytest"])
def test_the_real_database_is_refused_during_a_test_run(tmp_path: Path, runner: str) -> None:
    run_tests(runner, "without_database", default=sqlite(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_is_the_database_that_it_mirrors(tmp_path: Path) -> None:
    replica = {**sqlite(tmp_path), "TEST": {"MIRROR": "default"}}
    run_tests(
        "django", "with_database", default=sqlite(tmp_path, test="test.sqlite3"), replica=replica
    )
    assert list(tmp_path.iterdir()) == []


# -- PostgreSQL -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Server]:
    with new_server() as server:
        yield server


@pytest.fixture
def postgres(cluster: Server) -> Iterator[Server]:
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.mark.parametrize("runner", ["django", "pytest"])
def test_workers_use_the_test_database_of_a_server_and_let_go_of_it(
    postgres: Server, runner: str
) -> None:
    # The test run could not drop its database if a worker kept a connection open.
    output = run_tests(
        runner,
        "with_database",
        default=postgres.settings(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=True),
    )
    assert "skipped" not in output
    assert "accessed by other users" not in output


@pytest.fixture
def not_testing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that this process starts take it for a server."""
    monkeypatch.setattr(django_worker, "describe_tests", lambda: None)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.database_project.settings")


def backend_pids(manager: LeasedExecutorManager) -> set[int]:
    """Let both workers ask the server which of its processes serves them."""
    from tests.database_project import jobs

    with manager.lease_sync(workers=1) as one, manager.lease_sync(workers=1) as other:
        return {one.run_sync(jobs.backend_pid), other.run_sync(jobs.backend_pid)}


@pytest.mark.parametrize("health_checks", [True, False])
def test_a_restart_of_the_server_costs_no_call_that_has_health_checks(
    postgres: Server,
    not_testing: None,
    monkeypatch: pytest.MonkeyPatch,
    health_checks: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    settings = postgres.settings(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=health_checks)
    monkeypatch.setenv("LEASEPOOL_TESTS_DATABASES", json.dumps({"default": settings}))
    with running(2, backend="process", hooks=django_worker.__name__) as manager:
        before = backend_pids(manager)
        assert len(before) == 2
        assert backend_pids(manager) == before
        postgres.stop()
        postgres.start()
        if not health_checks:
            # What is broken is found by the call that needs it, and is not there for the next.
            for _ in range(2):
                with pytest.raises(OperationalError):
                    backend_pids(manager)
        after = backend_pids(manager)
        assert len(after) == 2
        assert not before & after
