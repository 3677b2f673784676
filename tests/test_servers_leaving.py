"""Under a real server: a client that leaves while its request waits leaves the line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.servers.kinds import Kind, each_kind
from tests.servers.running import Server, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


@each_kind(lambda kind: kind.name == "uvicorn")
def test_a_client_that_leaves_while_waiting_leaves_the_line(kind: Kind, tmp_path: Path) -> None:
    with serving(kind, tmp_path) as (server,):
        server.wait_ready()
        files = [server.file(), server.file()]
        with server.asking("/spin", mark=files[0]), server.asking("/spin", mark=files[1]):
            workers = {server.running(file) for file in files}
            for path in ("/once/async", "/lease/async"):
                with server.asking(path):
                    wait_for_line(server, waiting=1)
                wait_for_line(server, waiting=0)
            assert workers <= server.workers()  # the first two run on


def wait_for_line(server: Server, *, waiting: int) -> None:
    """Wait until so many stand in line, while both workers are busy."""
    expected = {"waiting": waiting, "busy": 2}
    wait_until(lambda: server.get("/line").body == expected, timeout=5, message=server.output)
