"""Workers are ready when ``start()`` returns, or it fails, says why, and leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import multiprocessing.spawn
import os
import threading
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from leasepool_django import (
    LeasePoolNotStartedError,
    NotPicklableError,
    UnsupportedBackendError,
    WorkerStartError,
)
from leasepool_django.engine import Event
from tests import process_jobs as jobs
from tests.process_pools import failed_start, new_manager, running, wait_all_idle
from tests.process_table import fork_servers, worker_pids

METHODS = ["forkserver", "spawn"]
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder whose modules can be imported, here and (so the contract) in workers."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


# --- the initializer --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["process", "inline"])
@pytest.mark.parametrize(
    "name",
    [
        "coroutine",
        "generator",
        "async_generator",
        "partial_generator",
        "wrapped_generator",
        "generating",
        "managing",
        "managing_async",
    ],
)
def test_an_initializer_whose_body_would_not_run_fails_the_start(name: str, backend: str) -> None:
    error = failed_start(initializer=f"tests.process_jobs.{name}", backend=backend)
    assert "The initializer is a coroutine or generator function" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "give_a_generator",
        "give_a_context_manager",
        "enter_a_context_manager",
        "give_an_odd_one",
    ],
)
def test_what_an_initializer_returns_does_not_matter(name: str) -> None:
    with running(initializer=f"tests.process_jobs.{name}") as manager:
        assert manager.run_sync(jobs.echo, 1) == 1


def test_a_failed_start_that_nobody_waits_for_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        manager = new_manager(initializer=jobs.initialize_badly)
        starting = asyncio.create_task(manager.start())
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        with pytest.raises(WorkerStartError):
            await manager.start()
        gc.collect()

    asyncio.run(main())
    gc.collect()
    assert "never retrieved" not in caplog.text


@each_method
@pytest.mark.parametrize("initializer", [jobs.initialize, "tests.process_jobs.initialize"])
def test_each_worker_is_initialized_before_its_first_call(
    initializer: Any, method: str, tmp_path: Path
) -> None:
    with (
        running(
            2, initializer=initializer, initargs=["eu", {"a": 1}], mp_context=method
        ) as manager,
        manager.lease_sync() as lease,
    ):
        found = list(lease.executor.map(jobs.meet_initialized, [tmp_path] * 2, [2] * 2))
    assert found == [[("eu", {"a": 1})]] * 2


def test_a_replacement_is_initialized_too() -> None:
    with running(initializer=jobs.initialize, initargs=(1,), max_tasks_per_child=1) as manager:
        pids = {manager.run_sync(os.getpid) for _ in range(2)}
        assert len(pids) == 2
        assert manager.run_sync(jobs.read_initialized) == [(1,)]


def test_large_initargs_arrive() -> None:
    value = os.urandom(1 << 20)
    with running(initializer=jobs.initialize, initargs=[value]) as manager:
        assert manager.run_sync(jobs.read_initialized) == [(value,)]


@each_method
def test_a_raising_initializer_fails_the_start_with_its_traceback(method: str) -> None:
    error = failed_start(initializer=jobs.initialize_badly, mp_context=method)
    assert error.traceback_text is not None
    for text in (str(error), error.traceback_text.rstrip()):
        assert text.endswith("RuntimeError: the initializer's own words")
        assert "in initialize_badly" in text


@each_method
def test_the_error_of_an_initializer_arrives_whole_however_long_it_is(method: str) -> None:
    words = "many words " * 50_000
    error = failed_start(initializer=jobs.initialize_badly, initargs=[words], mp_context=method)
    assert words.strip() in str(error)


@each_method
def test_sys_exit_in_the_initializer_fails_the_start(method: str) -> None:
    error = failed_start(initializer=jobs.initialize_with_sys_exit, mp_context=method)
    assert str(error).endswith("SystemExit: leaving early")


@each_method
@pytest.mark.parametrize(
    ("initializer", "manner"),
    [
        (jobs.initialize_with_os_exit, "It exited with status 17 while it started."),
        (jobs.kill_own_process, "It was killed by SIGKILL while it started."),
    ],
)
def test_a_worker_that_dies_in_its_initializer_fails_the_start(
    initializer: Any, manner: str, method: str
) -> None:
    error = failed_start(initializer=initializer, mp_context=method)
    assert str(error) == f"A worker could not get ready.\n{manner}"


@each_method
def test_a_hanging_initializer_fails_the_start_after_start_timeout(
    method: str, tmp_path: Path
) -> None:
    """What the initializer had started, in a session of its own, is gone as well."""
    error = failed_start(
        initializer=jobs.initialize_for_ever,
        initargs=[tmp_path],
        mp_context=method,
        start_timeout=1.5,
    )
    assert "not ready within start_timeout (1.5 s) and was killed" in str(error)
    assert "its initializer hangs or is slow" in str(error)
    assert list(tmp_path.iterdir()), "no worker had got into its initializer"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tests.nowhere.initialize", "ModuleNotFoundError: No module named 'tests.nowhere'"),
        ("tests.process_jobs.nothing", "has no attribute 'nothing'"),
    ],
)
def test_an_initializer_that_is_not_there_fails_the_start(path: str, text: str) -> None:
    assert text in str(failed_start(initializer=path))


def test_a_start_that_failed_can_be_repeated_and_succeed(tmp_path: Path) -> None:
    obstacle = tmp_path / "obstacle"
    obstacle.touch()
    manager = new_manager(initializer=jobs.initialize_until, initargs=[obstacle])
    with pytest.raises(WorkerStartError, match="obstacle is still there"):
        manager.start_sync()
    obstacle.unlink()
    manager.start_sync()
    try:
        assert manager.run_sync(jobs.echo, 1) == 1
    finally:
        manager.stop_sync()


# --- preload ----------------------------------------------------------------------------------

RECORDER = "import os\nimported_by = os.getpid()\n"


def test_a_preloaded_module_is_imported_once_and_shared(modules: Path) -> None:
    (modules / "recorder.py").write_text(RECORDER)
    with running(2, preload=["recorder"]) as manager, manager.lease_sync() as lease:
        found = set(lease.executor.map(jobs.attribute, ["recorder"] * 2, ["imported_by"] * 2))
        assert found == set(fork_servers())


@pytest.mark.skipif(
    not jobs.asks_for_huge_pages(),
    reason="the C library is older than glibc 2.35, or the kernel gives huge pages to all or none",
)
def test_preloaded_objects_lie_in_memory_for_which_huge_pages_are_asked_for(modules: Path) -> None:
    """Whether there are any is the kernel's decision."""
    (modules / "large.py").write_text("held = [bytes(1_000) for _ in range(20_000)]")
    with running(preload=["large"]) as manager:
        address = manager.run_sync(jobs.address, "large", "held")
        assert "hg" in manager.run_sync(jobs.memory_flags, address)


def test_with_spawn_each_worker_imports_what_is_to_be_preloaded(modules: Path) -> None:
    (modules / "recorder.py").write_text(RECORDER)
    with running(preload=["recorder"], mp_context="spawn") as manager:
        assert [manager.run_sync(jobs.attribute, "recorder", "imported_by")] == worker_pids()


COLLECTING = """
import asyncio
import gc

def collections():
    return [generation["collections"] for generation in gc.get_stats()]

before = collections()
held = [[] for _ in range(50_000)]
during = [now - then for now, then in zip(collections(), before)]
"""


@each_method
def test_nothing_is_collected_while_workers_are_prepared(method: str, modules: Path) -> None:
    """It would look at all that is imported; afterwards collections are as frequent as usual."""
    (modules / "collecting.py").write_text(COLLECTING)
    with running(preload=["collecting"], mp_context=method) as manager:
        assert manager.run_sync(jobs.attribute, "collecting", "during") == [0, 0, 0]
        assert manager.run_sync(gc.get_threshold) == gc.get_threshold()
        frozen = manager.run_sync(gc.get_freeze_count)
        collected = manager.run_sync(jobs.collections_since_prepared, "collecting")
    if method == "forkserver":
        assert frozen > 50_000
        assert collected[2] == 1  # before what is there is frozen


@each_method
@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise RuntimeError('not today')", "RuntimeError: not today"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("import os; os._exit(23)", "exited with status 23"),
    ],
)
def test_a_preload_module_that_fails_fails_the_start(
    source: str, text: str, method: str, modules: Path
) -> None:
    (modules / "failing.py").write_text(source)
    assert text in str(failed_start(preload=["failing"], mp_context=method))


def test_whatever_fails_in_the_fork_server_is_told(modules: Path) -> None:
    """Also what follows the imports."""
    (modules / "breaking.py").write_text("import gc\ndel gc.freeze")
    text = str(failed_start(preload=["breaking"]))
    assert "The fork server could not prepare workers" in text
    assert "AttributeError: module 'gc' has no attribute 'freeze'" in text


@each_method
def test_a_preload_module_that_is_missing_fails_the_start(method: str) -> None:
    error = failed_start(preload=["tests.nowhere"], mp_context=method)
    assert str(error).endswith("ModuleNotFoundError: No module named 'tests.nowhere'")


def test_a_preload_module_that_hangs_fails_the_start_after_start_timeout(modules: Path) -> None:
    (modules / "hanging.py").write_text("import threading; threading.Event().wait()")
    error = failed_start(preload=["hanging"], start_timeout=0.5)
    assert "took longer than start_timeout (0.5 s)" in str(error)


def test_what_a_failing_preload_had_started_is_gone(modules: Path, tmp_path: Path) -> None:
    """The check for what a test leaves behind looks for it."""
    (modules / "starting.py").write_text(
        dedent(f"""
            from pathlib import Path
            from tests import process_jobs as jobs
            Path({str(tmp_path / "pids")!r}).write_text(repr(jobs.start_all_kinds()))
            raise RuntimeError("after starting")
        """)
    )
    assert "after starting" in str(failed_start(preload=["starting"]))
    assert (tmp_path / "pids").read_text().count(",") == 4


def test_a_preload_that_starts_threads_is_remarked_upon(modules: Path) -> None:
    """A fork has none of them, but may have what they had locked."""
    (modules / "threaded.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, name='poller', daemon=True).start()\n"
    )
    events: list[Event] = []
    manager = new_manager(preload=["threaded"])
    manager.subscribe(events.append)
    manager.start_sync()
    try:
        assert manager.run_sync(threading.active_count) == 1
    finally:
        manager.stop_sync()
    (remark,) = [event for event in events if event.kind == "fork_server_remark"]
    assert "started threads (poller)" in remark.text
    assert "mp_context='spawn'" in remark.text


# --- start methods ----------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False], ids=["name", "context"])
@each_method
def test_the_start_method_is_given_by_name_or_as_a_context(method: Any, *, named: bool) -> None:
    context = method if named else multiprocessing.get_context(method)
    with running(mp_context=context) as manager:
        (server,) = fork_servers()
        command = Path(f"/proc/{manager.run_sync(os.getpid)}/cmdline").read_text()
        # A fork keeps the fork server's command line.
        assert ("process.worker" in command) == (method == "spawn")
        assert manager.run_sync(os.getppid) == server


@pytest.mark.parametrize("context", ["fork", multiprocessing.get_context("fork")])
def test_fork_is_refused_with_the_reason(context: Any) -> None:
    with pytest.raises(UnsupportedBackendError, match="mp_context='fork' is refused: forking a"):
        new_manager(mp_context=context)


def test_workers_of_one_manager_share_a_fork_server_and_managers_do_not() -> None:
    with running(2) as one, running(2) as other:
        servers = {manager.run_sync(os.getppid) for manager in (one, other)}
        assert servers == set(fork_servers())
        assert len(servers) == 2


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "error", "text"),
    [
        ("initargs", "eu", TypeError, "initargs must be a tuple or list, not str"),
        ("initializer", 7, TypeError, "initializer must be callable or a dotted path, not 7"),
        ("initializer", "configure", ValueError, "must be a dotted path, not 'configure'"),
        ("initializer", lambda: None, NotPicklableError, "is a lambda"),
        ("initargs", [threading.Lock()], NotPicklableError, r"initargs\[0\]"),
        ("preload", "shop.scoring", TypeError, "preload must be a list of dotted paths"),
        ("preload", [1], TypeError, "preload must be a list of dotted paths"),
        ("max_tasks_per_child", 0, ValueError, "max_tasks_per_child must be at least 1, not 0"),
        ("max_tasks_per_child", True, TypeError, "must be an integer, not True"),
        ("max_rss_per_child", 1.5, TypeError, "max_rss_per_child must be an integer, not 1.5"),
        ("nice", "10", TypeError, "nice must be an integer, not '10'"),
        ("nice", -1, ValueError, "nice must be from 0 to 19, not -1"),
        ("scheduling", "batch", ValueError, "must be 'normal' or 'idle', not 'batch'"),
        ("start_timeout", 0, ValueError, "start_timeout must be more than 0 seconds, not 0"),
        ("mp_context", "thread", ValueError, "must be 'forkserver' or 'spawn', not 'thread'"),
        ("max_task_per_child", 3, TypeError, "no option 'max_task_per_child'"),
    ],
)
def test_a_bad_option_is_refused_at_construction(
    option: str, value: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        new_manager(**{option: value})


# --- inside workers ---------------------------------------------------------------------------


def test_a_worker_cannot_start_a_manager_of_its_own() -> None:
    with running() as manager:
        with pytest.raises(LeasePoolNotStartedError, match="cannot be started inside a worker"):
            manager.run_sync(jobs.start_a_manager)
        wait_all_idle(manager)
