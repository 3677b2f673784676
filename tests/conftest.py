"""What every test gets: nothing may be left behind; and event loops of both kinds."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests import leaks
from tests.settings import DATABASE_FILE
from tests.stage import Stage

# For tests of this file's own fixtures: runs of pytest inside a test.
pytest_plugins = ["pytester"]

T = TypeVar("T")

HAS_UVLOOP = importlib.util.find_spec("uvloop") is not None

_failed = pytest.StashKey[bool]()


def pytest_configure() -> None:
    leaks.mark_children()
    if HAS_UVLOOP:
        # libuv opens a pipe for signals with a process's first loop and keeps it: no test's leak.
        _uvloop_loop().close()


def pytest_unconfigure() -> None:
    # A worker that looks into the database creates the file, also where no test did. A run inside a
    # test has the file from the run outside.
    if DATABASE_FILE.endswith(f"-{os.getpid()}.sqlite3"):
        Path(DATABASE_FILE).unlink(missing_ok=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    result = yield
    item.stash[_failed] = item.stash.get(_failed, False) or result.failed
    return result


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which a process, a thread or a file descriptor is left.

    A test that has failed already is not reported twice: its traceback keeps its objects alive.
    """
    before = leaks.take_snapshot()
    yield
    failed = request.node.stash.get(_failed, False)
    leaked = leaks.new_since(before, timeout=0.5 if failed else None)
    if leaked:
        text = leaks.report(leaked)
        leaks.kill(leaked.processes)
        if not failed:
            pytest.fail(text, pytrace=False)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Where work functions wait for the test; at its end all of them may go."""
    stage = Stage(tmp_path)
    yield stage
    stage.let_go()


@dataclass(frozen=True)
class LoopRunner:
    """Runs coroutines, each on a new event loop of one kind. ``name``: "asyncio" or "uvloop"."""

    name: str
    new_event_loop: Callable[[], asyncio.AbstractEventLoop]

    def __call__(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` to its end and return its result; the loop is closed afterwards."""
        with asyncio.Runner(loop_factory=self.new_event_loop) as runner:
            return runner.run(coroutine)


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_runner(request: pytest.FixtureRequest) -> LoopRunner:
    """Run the test once on each kind of event loop."""
    if request.param == "asyncio":
        return LoopRunner("asyncio", asyncio.SelectorEventLoop)
    if not HAS_UVLOOP:
        pytest.skip("uvloop is not installed")
    return LoopRunner("uvloop", _uvloop_loop)


def _uvloop_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()
