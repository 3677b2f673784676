"""The backends that the contract is held over.

Where they may differ a test reads the ``supports_*`` flags and never asks for a backend by name.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from leasepool_django import LeasedExecutorManager
from leasepool_django.backends.base import Backend, resolve
from tests import managers
from tests.stage import Stage


@dataclass(frozen=True)
class Kind:
    """One kind of backend, with the options that make it."""

    backend: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def flags(self) -> type[Backend]:
        """What has the ``supports_*`` flags."""
        return resolve(self.backend)

    def manager(self, workers: int = 1, **options: Any) -> LeasedExecutorManager:
        """Make a manager, not started."""
        return managers.new_manager(workers, backend=self.backend, **self.options, **options)

    def running(
        self, workers: int = 1, **options: Any
    ) -> AbstractContextManager[LeasedExecutorManager]:
        """Give a started manager, stopped afterwards."""
        return managers.running(workers, backend=self.backend, **self.options, **options)

    @contextmanager
    def time_runs_out(self, stage: Stage, name: str) -> Iterator[None]:
        """Block here in a call that holds ``name`` and whose time is over after 0.1 s.

        A caller that runs the function itself is let go after that time.
        """
        timer = threading.Timer(0.3, stage.let_go, [name])
        if not self.flags.supports_prompt_deadlines:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()


KINDS = {
    "forkserver": Kind("process", {"mp_context": "forkserver"}),
    "spawn": Kind("process", {"mp_context": "spawn"}),
    "thread": Kind("thread"),
    "inline": Kind("inline"),
    "executor-class": Kind(
        "concurrent.futures.ProcessPoolExecutor",
        {"mp_context": multiprocessing.get_context("spawn")},
    ),
    "dask": Kind("dask"),
}


def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """Those of a kind: a cluster takes its time."""
    return (pytest.mark.slow,) if name == "dask" else ()


# Where calls are isolated, as parameters of a test.
ISOLATED = [
    pytest.param(name, marks=marks(name)) for name in KINDS if KINDS[name].flags.supports_isolation
]


@pytest.fixture(params=[pytest.param(name, marks=marks(name)) for name in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Run the test once with each backend."""
    return KINDS[request.param]


@pytest.fixture(scope="session", autouse=True)
def dask_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start a cluster, where a test of this run needs one, and have it used."""
    here = Path(__file__).parent
    if not any("[dask" in item.name for item in request.session.items if item.path.parent == here):
        yield
        return
    import dask.config

    from tests.dask_cluster import cluster

    with cluster(4) as address, dask.config.set({"scheduler-address": address}):
        yield
