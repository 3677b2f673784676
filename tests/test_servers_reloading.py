"""Reloading servers: a changed file ends the old workers; a busy one is not waited for long."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.servers.kinds import KINDS, Kind
from tests.servers.running import serving
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

# uvicorn's old process is given the grace; that of runserver ends at once.
GRACES = {"uvicorn --reload": 1.0, "manage.py runserver": 60.0}
# The reloader's look at the files, the end of the old process, and the start of the new one.
OVERHEAD = 10.0


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind.name in GRACES],
    ids=lambda kind: kind.name,
)
def test_a_changed_file_does_not_wait_for_a_busy_worker(kind: Kind, tmp_path: Path) -> None:
    grace = GRACES[kind.name]
    limit = OVERHEAD + (grace if kind.name == "uvicorn --reload" else 0)
    with serving(kind, tmp_path, {"SERVERS_GRACE": str(grace)}) as (server,):
        server.wait_ready()
        before = server.get("/alive").body["pid"]
        file = server.file()
        with server.asking("/spin", mark=file):
            server.running(file)
            pool = server.pool_processes()
            later = time.time() + 2  # the reloader compares times of whole files
            os.utime(server.folder / "touched.py", (later, later))
            begun = time.monotonic()
            wait_until(
                lambda: server.get("/alive").body.get("pid", before) != before,
                timeout=limit,
                message=server.output,
            )
            assert time.monotonic() - begun < limit
        assert not pool & server.processes()
        assert server.get("/once/sync").status == 200
        assert server.workers()
        server.terminate()
        server.wait_end()
