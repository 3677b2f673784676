"""Under each server: a pool that cannot start says why, and is not mistaken for "no lifespan"."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.servers.kinds import Kind, each_kind
from tests.servers.recording import observed
from tests.servers.running import Server, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

REASON = "the licence server said no"


@each_kind()
def test_a_pool_that_cannot_start_gives_the_reason(kind: Kind, tmp_path: Path) -> None:
    with (
        observed(kind) as cells,
        serving(kind, tmp_path, {"SERVERS_BROKEN": REASON}) as (server,),
    ):
        if not kind.lifespan:
            cells["failed start"] = the_first_request_fails(server)
        elif not kind.failed_status:
            cells["failed start"] = the_server_waits_for_a_change(server)
        else:
            status = server.wait_end()
            assert status in kind.failed_status, server.output()
            statuses = " or ".join(map(str, kind.failed_status))
            cells["failed start"] = f"server ends, status {statuses}"
        output = server.output()
        assert f"RuntimeError: {REASON}" in output, output
        if kind.lifespan:
            assert "The lease pools did not start: WorkerStartError: " in output, output
            assert "unsupported" not in output


def the_first_request_fails(server: Server) -> str:
    server.wait_ready()
    answer = server.get("/once/async")
    assert answer.status == 500
    assert not server.pool_processes()
    server.terminate()
    server.wait_end()
    return "request fails"


def the_server_waits_for_a_change(server: Server) -> str:
    wait_until(lambda: REASON in server.output(), timeout=20, message=server.output)
    wait_until(lambda: not server.pool_processes(), timeout=5)
    server.terminate()
    server.wait_end()
    return "waits for a change"
