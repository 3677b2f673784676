"""A default time-out of sockets, in the server or in a worker, is none of the engine's sockets'."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import process_jobs as jobs
from tests.process_pools import running
from tests.waiting import wait_until

each_method = pytest.mark.parametrize("method", ["forkserver", "spawn"])

PRELOADED = """
import socket
socket.setdefaulttimeout(0.01)
"""


@pytest.fixture(params=["server", "worker"])
def method_with_a_timeout(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Set a default time-out: here, or in a module; give what has to be preloaded."""
    before = socket.getdefaulttimeout()
    if request.param == "server":
        socket.setdefaulttimeout(0.01)
        yield []
        socket.setdefaulttimeout(before)
    else:
        (tmp_path / "impatient.py").write_text(PRELOADED)
        monkeypatch.syspath_prepend(str(tmp_path))
        yield ["impatient"]


@each_method
def test_large_errors_and_results_arrive(method: str, method_with_a_timeout: list[str]) -> None:
    """What a worker sends may take longer than a socket takes it at once."""
    with running(mp_context=method, preload=method_with_a_timeout, max_shared_bytes=0) as manager:
        pid = manager.run_sync(os.getpid)
        with pytest.raises(ValueError, match="xxx") as caught:
            manager.run_sync(jobs.raise_large, 3_000_000)
        assert len(caught.value.args[0]) == 3_000_000
        assert len(manager.run_sync(jobs.echo, bytes(3_000_000))) == 3_000_000
        assert manager.run_sync(os.getpid) == pid


@each_method
def test_bursts_of_log_records_arrive(
    method: str, method_with_a_timeout: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "tests.worker"),
        running(
            mp_context=method, preload=method_with_a_timeout, forward_process_logs=True
        ) as manager,
    ):
        assert manager.run_sync(jobs.log_many, 5_000) == 5_000
        wait_until(lambda: len(caplog.records) >= 5_000)
    assert [record.getMessage() for record in caplog.records][-1] == "record 4999"


@each_method
def test_workers_are_told_much_before_their_first_call(
    method: str, method_with_a_timeout: list[str]
) -> None:
    """More than the fork server's socket takes at once."""
    with running(
        mp_context=method,
        preload=method_with_a_timeout,
        initializer=jobs.initialize,
        initargs=[bytes(3_000_000)],
    ) as manager:
        ((received,),) = manager.run_sync(jobs.read_initialized)
        assert len(received) == 3_000_000
