"""What users' tests are given: assertions, the pytest fixture, and pools that follow settings."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.test import override_settings

from leasepool_django import LeasePoolNotStartedError, pools, run_in_pool_sync
from leasepool_django.testing import assert_no_leases, assert_no_workers
from tests import jobs
from tests.managers import running
from tests.stage import Stage
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

ROOT = Path(__file__).parents[1]
PLUGIN = "leasepool_django.pytest_plugin"
# The project whose tests docs/testing.md shows.
DESK = ROOT / "tests" / "recipes" / "desk"

THREADS = {"BACKEND": "thread", "WORKERS_PER_POOL": 2}
INLINE = {"BACKEND": "inline", "WORKERS_PER_POOL": 2}


@pytest.fixture
def threads(settings: Settings) -> Iterator[None]:
    settings.LEASEPOOL = {"default": THREADS, "reports": THREADS}
    yield
    pools.reset()


# -- assertions -----------------------------------------------------------------------------------


def test_pools_that_nobody_uses_have_neither_leases_nor_workers(threads: None) -> None:
    assert_no_leases()
    assert_no_workers()
    assert not any(manager.started for manager in pools.values())


def test_a_lease_that_is_held_is_named(threads: None) -> None:
    with (
        pools["reports"].lease_sync(owner="invoice 7"),
        pytest.raises(AssertionError) as raised,
    ):
        assert_no_leases(timeout=0)
    text = str(raised.value)
    assert text.startswith("A test has left work in a pool:\n- leasepool-reports: lease ")
    assert "of 2 worker(s), owner 'invoice 7'" in text
    assert_no_leases(timeout=0)


def test_calls_that_run_and_callers_who_wait_are_named(threads: None, stage: Stage) -> None:
    with ThreadPoolExecutor() as callers:
        calls = [callers.submit(run_in_pool_sync, jobs.hold, stage.folder, name) for name in "abc"]
        manager = pools["default"]
        wait_until(lambda: (manager.stats().waiting, manager.stats().busy_workers) == (1, 2))
        with pytest.raises(AssertionError) as raised:
            assert_no_leases(timeout=0)
        assert str(raised.value).count("tests.jobs.hold still runs") == 2
        assert "1 caller(s) wait in line" in str(raised.value)
        stage.let_go()
        assert [call.result() for call in calls] == ["a", "b", "c"]
    assert_no_leases()


def test_what_is_on_its_way_back_is_waited_for(threads: None, stage: Stage) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pools["default"].run(jobs.hold, stage.folder, "slow")

    asyncio.run(give_up())
    with pytest.raises(AssertionError):
        assert_no_leases(timeout=0)
    with ThreadPoolExecutor() as elsewhere:
        waiting = elsewhere.submit(assert_no_leases)
        stage.let_go()
        waiting.result()


def test_a_lease_that_was_dropped_is_not_held(threads: None) -> None:
    def drop_a_lease() -> None:
        pools["default"].acquire_sync()
        assert_no_leases()
        pools.reset()  # ends the thread that warns

    with pytest.warns(ResourceWarning, match="dropped without release"):
        drop_a_lease()


def test_workers_are_named_until_the_pools_are_stopped(settings: Settings) -> None:
    settings.LEASEPOOL = {"default": {"WORKERS_PER_POOL": 1}}
    pid, _ = run_in_pool_sync(jobs.whoami)
    with pytest.raises(AssertionError, match=rf"1 worker\(s\) of the running .*\[{pid}\]"):
        assert_no_workers(timeout=0)
    manager = pools["default"]
    pools.reset()
    assert_no_workers(timeout=0)
    assert_no_workers(manager, timeout=0)


def test_managers_outside_of_the_settings_can_be_named() -> None:
    with running(backend="thread") as manager:
        with manager.lease_sync(), pytest.raises(AssertionError, match="lease leasepool-1"):
            assert_no_leases(manager, timeout=0)
        with pytest.raises(AssertionError, match="1 worker"):
            assert_no_workers(manager, timeout=0)
    assert_no_workers(manager)


# -- settings -------------------------------------------------------------------------------------


def test_overridden_settings_make_new_pools_and_end_the_old_ones() -> None:
    before = pools["default"]
    pid, _ = run_in_pool_sync(jobs.whoami)
    with override_settings(LEASEPOOL={"default": {"WORKERS_PER_POOL": 1}, "other": THREADS}):
        assert_no_workers(before)
        assert set(pools) == {"default", "other"}
        within = pools["default"]
        assert within.workers_per_pool == 1
        assert run_in_pool_sync(jobs.whoami)[0] != pid
        with pytest.raises(LeasePoolNotStartedError, match="out of service"):
            before.run_sync(jobs.whoami)
    assert_no_workers(within)
    assert set(pools) == {"default", "reports"}
    assert pools["default"].workers_per_pool == before.workers_per_pool
    assert run_in_pool_sync(jobs.add, 1) == 1
    pools.reset()


def test_a_call_under_way_ends_with_the_settings_it_was_begun_under(stage: Stage) -> None:
    with ThreadPoolExecutor() as callers:
        with override_settings(LEASEPOOL={"default": THREADS}):
            call = callers.submit(run_in_pool_sync, jobs.hold, stage.folder, "call")
            stage.wait_begun("call")
        with pytest.raises(LeasePoolNotStartedError, match="was stopped before this call had"):
            call.result()
        stage.let_go()


def test_other_settings_leave_the_pools_alone(threads: None) -> None:
    manager = pools["default"]
    with override_settings(LANGUAGE_CODE="de"):
        assert pools["default"] is manager


# -- the pytest plugin ----------------------------------------------------------------------------


def inner_run(
    pytester: pytest.Pytester, text: str, *, leasepool: dict[str, Any] | None = None
) -> pytest.RunResult:
    """Run tests with the fixture in this very process, where Django is set up already."""
    # Such a run takes the modules that it was the first to import out of sys.modules again.
    import_module("leasepool_django.backends.inline")
    import_module("leasepool_django.backends.process.pool")
    import_module("leasepool_django.engine.stats")
    pytester.makepyfile(text)
    with override_settings(LEASEPOOL=leasepool or {"default": INLINE}):
        # Neither pytest-django, which would set Django up once more, nor this project's fixtures.
        return pytester.runpytest_inprocess("-p", "no:django", "-p", "no:randomly")


def test_the_fixture_gives_started_pools(pytester: pytest.Pytester) -> None:
    result = inner_run(
        pytester,
        """
        import asyncio
        from tests import jobs

        def test_blocking(leasepool):
            assert leasepool["default"].started
            assert leasepool["default"].run_sync(jobs.add, 1, right=1) == 2

        def test_asynchronous(leasepool):
            assert asyncio.run(leasepool["default"].run(jobs.add, 1, right=2)) == 3
        """,
    )
    result.assert_outcomes(passed=2)
    assert_no_workers()


def test_a_test_that_leaves_a_lease_fails_and_the_next_finds_the_pool_free(
    pytester: pytest.Pytester,
) -> None:
    result = inner_run(
        pytester,
        """
        leases = []

        def test_leaves_a_lease(leasepool):
            leases.append(leasepool["default"].acquire_sync(owner="forgetful"))

        def test_next(leasepool):
            with leasepool["default"].acquire_sync(wait=False) as lease:
                assert lease.workers == 2
            assert "expired" not in repr(leases[0])
            assert "open" not in repr(leases[0])
        """,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["A test has left work in a pool:", "*lease*owner 'forgetful', has been held for*"]
    )
    assert_no_workers()


def test_a_test_that_leaves_a_call_fails(pytester: pytest.Pytester, stage: Stage) -> None:
    result = inner_run(
        pytester,
        f"""
        import pathlib, threading
        from tests import jobs
        from tests.stage import Stage

        stage = Stage(pathlib.Path({str(stage.folder)!r}))

        def call(pool):
            try:
                pool.run_sync(jobs.hold, stage.folder, "left")
            except Exception:
                pass

        def test_leaves_a_call(leasepool):
            threading.Thread(target=call, args=[leasepool["default"]]).start()
            stage.wait_begun("left")
        """,
        leasepool={"default": {"WORKERS_PER_POOL": 1}},
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*tests.jobs.hold still runs (process *"])


def test_settings_may_change_under_the_fixture(pytester: pytest.Pytester) -> None:
    result = inner_run(
        pytester,
        """
        from django.test import override_settings
        from tests import jobs

        def test_changed(leasepool):
            with override_settings(LEASEPOOL={"small": {"BACKEND": "inline"}}):
                assert leasepool["small"].run_sync(jobs.add, 1) == 1

        def test_changed_back(leasepool):
            assert set(leasepool) == {"default"}
        """,
    )
    result.assert_outcomes(passed=2)


def test_wrong_settings_in_a_test_are_not_read_at_its_end(pytester: pytest.Pytester) -> None:
    result = inner_run(
        pytester,
        """
        import pytest
        from django.core.exceptions import ImproperlyConfigured
        from django.test import override_settings

        @pytest.fixture
        def wrong(leasepool):
            override = override_settings(LEASEPOOL={"default": {"MAX_POOLS": 0}})
            override.enable()
            with pytest.raises(ImproperlyConfigured):
                leasepool["default"]
            return override

        overrides = []

        def test_wrong(leasepool, wrong):
            overrides.append(wrong)

        @pytest.fixture(autouse=True)
        def restored(request):
            yield
            for override in overrides:
                override.disable()
        """,
    )
    result.assert_outcomes(passed=1)


def run(folder: Path, *arguments: str) -> str:
    """Run a module of Python in a folder; its output, if it has not failed."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(DESK.parent)]),
            "DJANGO_SETTINGS_MODULE": "desk.settings",
            "DESK_FOLDER": str(folder),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def run_pytest(folder: Path, name: str, *arguments: str) -> str:
    """Run pytest as a user does: with all plugins that are installed, without this project's ini.

    ``name``: the test module in ``folder``.
    """
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    return run(folder, "pytest", "-q", "-p", "no:cacheprovider", *arguments, name)


def test_the_plugin_is_there_where_the_package_is_installed() -> None:
    [plugin] = [found for found in entry_points(group="pytest11") if found.name == "leasepool"]
    assert plugin.value == PLUGIN


def test_workers_serve_one_test_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "test_pids.py").write_text(
        "import pytest\n"
        "from tests import jobs\n"
        "pids = set()\n"
        "@pytest.mark.parametrize('time', range(6))\n"
        "def test_pid(leasepool, time):\n"
        "    pids.add(leasepool['default'].run_sync(jobs.whoami)[0])\n"
        "    assert len(pids) <= leasepool['default'].workers_per_pool\n"
    )
    assert "6 passed" in run_pytest(tmp_path, "test_pids.py")


def test_nothing_is_imported_or_started_for_those_who_do_not_ask(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(
        "import sys, threading\n"
        "def test_plain(pytestconfig):\n"
        f"    assert {PLUGIN!r} in sys.modules\n"
        "    loaded = {name for name in sys.modules if name.startswith('leasepool_django')}\n"
        f"    assert loaded == {{'leasepool_django', {PLUGIN!r}}}\n"
        "    assert 'django' not in sys.modules\n"
        "    assert threading.active_count() == 1\n"
    )
    assert "1 passed" in run_pytest(tmp_path, "test_plain.py", "-p", "no:django")


# -- docs/testing.md ------------------------------------------------------------------------------


def test_the_pages_tests_for_unittest_pass(tmp_path: Path) -> None:
    output = run(tmp_path, "django", "test", "desk.tests_inline", "desk.tests_workers")
    assert "Ran 5 tests" in output
    assert list(tmp_path.iterdir()) == []


def test_the_pages_tests_for_pytest_pass(tmp_path: Path) -> None:
    shutil.copy(DESK / "tests_pool.py", tmp_path / "test_pool.py")
    assert "3 passed" in run_pytest(tmp_path, "test_pool.py", "--ds=desk.settings")
    assert not list(tmp_path.glob("*.sqlite3"))
