"""Under each server: calls, leases, clients that leave, and an end that comes to all at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.servers.kinds import Kind, each_kind
from tests.servers.recording import observed
from tests.servers.running import Server, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


@each_kind()
def test_serves_and_lets_a_running_call_answer(kind: Kind, tmp_path: Path) -> None:
    with observed(kind) as cells, serving(kind, tmp_path) as (server,):
        server.wait_ready()
        cells["start"] = how_pools_start(server)
        cells["calls"] = who_can_call(server)
        cells["client leaves"] = what_happens_when_a_client_leaves(server)
        cells["every process"] = what_a_signal_to_all_does(server)


def how_pools_start(server: Server) -> str:
    # No matter which of several processes answers.
    with_server = server.get("/alive").body["state"]
    assert with_server == server.kind.lifespan
    assert bool(server.workers()) == with_server
    return "with the server" if with_server else "first use"


def who_can_call(server: Server) -> str:
    for path, expected in (("once", [42]), ("lease", [2, 4, 6])):
        for view in ("async", "sync"):
            answer = server.get(f"/{path}/{view}")
            assert answer.status == 200, server.output()
            assert [value for value, _ in answer.body["results"]] == expected
            assert {worker for _, worker in answer.body["results"]} <= server.workers()
    return "async and sync"


def what_happens_when_a_client_leaves(server: Server) -> str:
    file = server.file()
    if not server.kind.cancels:
        with server.asking("/slow/sync", seconds=0.3, mark=file):
            worker = server.running(file)
        assert server.get("/once/sync").status == 200
        assert server.exists(worker)
        return "runs on"
    before = server.workers()
    with server.asking("/spin", mark=file):
        worker = server.running(file)
    wait_until(lambda: not server.exists(worker), timeout=1, message=server.output)
    wait_until(lambda: len(server.workers()) == len(before), timeout=5, message=server.output)
    assert server.get("/once/async").status == 200
    return "killed"


def what_a_signal_to_all_does(server: Server) -> str:
    file = server.file()
    view = "async" if server.kind.cancels else "sync"
    answer = server.ask(f"/slow/{view}", seconds=1, mark=file)
    worker = server.running(file)
    server.terminate_all()
    server.wait_end()
    if not server.kind.on_term_to_all:
        assert answer.result().status in {0, 500, 503}, server.output()
        return "cut off"
    assert "Traceback" not in server.output(), server.output()
    assert worker in answer.result().body["workers"], server.output()
    return "answered; may hang" if server.kind.hangs else "answered"
