"""Workers are good Django citizens: context, connections, caches, and what they tell of errors."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfoNotFoundError

import pytest
from django.contrib.auth.models import User
from django.utils import timezone, translation

from leasepool_django import pools, run_in_pool, run_in_pool_sync
from leasepool_django.backends.process.django_worker import template
from tests import worker_jobs as jobs

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def one_worker(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One worker, so that every call finds what the one before has left."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.worker_settings")
    settings.LEASEPOOL = {"default": {"WORKERS_PER_POOL": 1}}
    yield
    pools.reset()


# -- language and time zone -----------------------------------------------------------------------


def test_a_worker_has_the_callers_language_and_time_zone(one_worker: None) -> None:
    async def view() -> list[Any]:
        seen = [await run_in_pool(jobs.language_and_zone)]
        with translation.override("de"), timezone.override("America/New_York"):
            seen.append(await run_in_pool(jobs.language_and_zone))
        with timezone.override(timezone.get_fixed_timezone(-90)):
            seen.append(await run_in_pool(jobs.language_and_zone))
        await run_in_pool(jobs.activate_something_else)
        seen.append(await run_in_pool(jobs.language_and_zone))
        return seen

    assert contextvars.Context().run(asyncio.run, view()) == [
        ("en", "Yes", "12:00 UTC"),
        ("de", "Ja", "08:00 EDT"),
        ("en", "Yes", "10:30 -0130"),
        ("en", "Yes", "12:00 UTC"),
    ]


def test_a_time_zone_that_a_worker_has_not_fails_each_call_and_not_the_first_only() -> None:
    for _ in range(2):
        with pytest.raises(ZoneInfoNotFoundError, match="Company/HQ"):
            template(("en", "Company/HQ"))


def test_tasks_side_by_side_keep_their_own(one_worker: None) -> None:
    async def view(language: str) -> str:
        translation.activate(language)
        return (await run_in_pool(jobs.language_and_zone))[1]

    async def several() -> list[str]:
        return await asyncio.gather(*(view(language) for language in ("de", "en", "de", "fr")))

    assert asyncio.run(several()) == ["Ja", "Yes", "Ja", "Oui"]


# -- connections ----------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_models_work_in_workers(one_worker: None) -> None:
    assert run_in_pool_sync(jobs.count_users) == 0
    key = run_in_pool_sync(jobs.create_user, "ada")
    assert User.objects.get().pk == key
    assert run_in_pool_sync(jobs.count_users) == 1


@pytest.mark.django_db(transaction=True)
def test_a_connection_is_closed_after_the_call_as_after_a_request(one_worker: None) -> None:
    run_in_pool_sync(jobs.use_connection)
    assert run_in_pool_sync(jobs.connection_state) == (False, False, False)


@pytest.mark.django_db(transaction=True)
def test_a_persistent_connection_serves_call_after_call(one_worker: None) -> None:
    run_in_pool_sync(jobs.keep_connections)
    first = run_in_pool_sync(jobs.use_connection)
    assert run_in_pool_sync(jobs.connection_state) == (True, False, False)
    assert run_in_pool_sync(jobs.use_connection) == first


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("leave_open", [jobs.leave_atomic_block_open, jobs.leave_autocommit_off])
def test_a_transaction_that_was_left_open_is_rolled_back(
    one_worker: None, leave_open: Callable[[str], None]
) -> None:
    run_in_pool_sync(jobs.keep_connections)
    run_in_pool_sync(leave_open, "nobody")
    assert run_in_pool_sync(jobs.connection_state) == (False, False, False)
    assert run_in_pool_sync(jobs.count_users) == 0
    assert run_in_pool_sync(jobs.create_user, "somebody") > 0
    assert User.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_a_broken_connection_is_replaced(one_worker: None) -> None:
    run_in_pool_sync(jobs.keep_connections)
    run_in_pool_sync(jobs.break_connection)
    assert run_in_pool_sync(jobs.connection_state) == (False, False, False)
    assert run_in_pool_sync(jobs.count_users) == 0


@pytest.mark.django_db(transaction=True)
def test_logged_queries_are_forgotten(one_worker: None) -> None:
    run_in_pool_sync(jobs.keep_connections)
    for _ in range(2):
        assert run_in_pool_sync(jobs.log_queries) == 1
    assert run_in_pool_sync(jobs.connection_state) == (True, False, False)


@pytest.mark.django_db(transaction=True)
def test_connections_of_asynchronous_code_are_tidied_too(one_worker: None) -> None:
    run_in_pool_sync(jobs.create_user, "ada")
    assert run_in_pool_sync(jobs.use_orm_on_a_loop) == 1
    assert run_in_pool_sync(jobs.connection_state_on_a_loop) == (True, False, False)
    run_in_pool_sync(jobs.leave_atomic_block_open_on_a_loop, "nobody")
    assert run_in_pool_sync(jobs.connection_state_on_a_loop) == (False, False, False)
    assert run_in_pool_sync(jobs.use_orm_on_a_loop) == 1


def test_caches_that_need_it_are_closed_after_the_call(one_worker: None) -> None:
    assert run_in_pool_sync(jobs.use_cache, "default", "a") == 0
    assert run_in_pool_sync(jobs.use_cache, "closing", "a") == 0
    assert run_in_pool_sync(jobs.use_cache, "closing", "b") == 1
    assert run_in_pool_sync(jobs.closed_caches) == 2
    assert run_in_pool_sync(jobs.closed_caches) == 2


def test_a_cache_that_does_not_exist_costs_only_who_uses_it(one_worker: None) -> None:
    with pytest.raises(Exception, match="no_such_module"):
        run_in_pool_sync(jobs.use_cache, "missing", "a")
    assert run_in_pool_sync(jobs.closed_caches) == 0


# -- set-up ---------------------------------------------------------------------------------------


def prepared(
    tmp_path: Path, program: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script that calls ``prepare`` in a fresh process, as the fork server does."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    clean = {key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"}
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


PREPARE = """
    from leasepool_django.backends.process import django_worker
    django_worker.prepare()
    from django.apps import apps
    print(apps.ready)
"""


def test_the_settings_module_is_set_up(tmp_path: Path) -> None:
    ran = prepared(tmp_path, PREPARE, DJANGO_SETTINGS_MODULE="tests.settings")
    assert (ran.returncode, ran.stdout) == (0, "True\n"), ran.stderr


def test_without_settings_it_says_what_to_do(tmp_path: Path) -> None:
    ran = prepared(tmp_path, PREPARE)
    assert ran.returncode != 0
    last = ran.stderr.splitlines()[-1]
    assert "ImproperlyConfigured: Workers cannot find the project's settings" in last
    assert "DJANGO_SETTINGS_MODULE" in last
    assert "OPTIONS['preload']" in last


def test_configured_settings_are_taken(tmp_path: Path) -> None:
    program = f"""
    from django.conf import settings
    settings.configure(USE_I18N=False)
    {PREPARE}
    """
    ran = prepared(tmp_path, textwrap.dedent(program.replace("\n\n    from", "\n    from")))
    assert (ran.returncode, ran.stdout) == (0, "True\n"), ran.stderr


def test_a_preload_module_may_bring_the_settings_and_others_their_models(tmp_path: Path) -> None:
    ran = prepared(
        tmp_path,
        """
        from django.conf import settings
        from leasepool_django.backends.process import django_worker

        seen = []

        def preload():
            from django.apps import apps
            if not settings.configured:
                settings.configure(INSTALLED_APPS=["django.contrib.contenttypes"])
            seen.append(apps.ready)

        django_worker.prepare(preload)
        print(seen)
        """,
    )
    assert (ran.returncode, ran.stdout) == (0, "[False, True]\n"), ran.stderr


def test_what_the_set_up_opens_is_closed_before_workers_are_forked(tmp_path: Path) -> None:
    ran = prepared(
        tmp_path,
        """
        import sys
        from django.conf import settings
        settings.configure(
            DATABASES={
                "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}
            },
            CACHES={"default": {"BACKEND": "tests.closing.Cache"}},
        )
        import types
        from django.core.cache.backends.locmem import LocMemCache

        class Cache(LocMemCache):
            closed = 0
            def close(self, **kwargs):
                Cache.closed += 1

        sys.modules["tests.closing"] = types.ModuleType("tests.closing")
        sys.modules["tests.closing"].Cache = Cache

        from leasepool_django.backends.process import django_worker

        def preload():
            from django.core.cache import cache
            from django.db import connection
            connection.force_debug_cursor = True
            connection.cursor().execute("SELECT 1")
            cache.set("a", 1)
            preload.connection = connection._connections["default"]

        django_worker.prepare(preload)
        from django.db import connections
        print(connections.all(initialized_only=True), preload.connection.connection, Cache.closed)
        """,
        str(tmp_path / "db.sqlite3"),
    )
    assert (ran.returncode, ran.stdout) == (0, "[] None 1\n"), ran.stderr


def test_a_project_may_be_configured_by_a_preload_module(tmp_path: Path) -> None:
    (tmp_path / "project_settings.py").write_text(
        textwrap.dedent(
            """
            from django.conf import settings

            settings.configure(
                INSTALLED_APPS=["django.contrib.contenttypes", "leasepool_django"],
                LEASEPOOL={
                    "default": {"WORKERS_PER_POOL": 1, "OPTIONS": {"preload": ["project_settings"]}}
                },
            )
            """
        )
    )
    (tmp_path / "project_jobs.py").write_text(
        "def models_are_ready():\n    from django.apps import apps\n    return apps.models_ready\n"
    )
    ran = prepared(
        tmp_path,
        """
        import project_jobs

        if __name__ == "__main__":
            import django
            import project_settings
            from leasepool_django import run_in_pool_sync

            django.setup()
            print(run_in_pool_sync(project_jobs.models_are_ready))
        """,
        PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}",
    )
    assert (ran.returncode, ran.stdout) == (0, "True\n"), ran.stderr
