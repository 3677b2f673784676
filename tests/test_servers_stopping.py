"""Under each server: SIGTERM, Ctrl-C and SIGKILL, each with a call that runs."""

from __future__ import annotations

import signal
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.servers.kinds import Kind, each_kind
from tests.servers.recording import observed
from tests.servers.running import Answer, Server, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


@each_kind()
def test_ends_by_itself_and_leaves_nothing(kind: Kind, tmp_path: Path) -> None:
    # Three of a kind at once: most of the time is spent waiting.
    with observed(kind) as cells, serving(kind, tmp_path, {}, {}, {}) as servers:
        terminated, interrupted, killed = servers
        for server in servers:
            server.wait_ready()
        call = SlowCall(terminated)
        terminated.terminate()
        other_call = SlowCall(interrupted)
        interrupted.interrupt()

        file = killed.file()
        with killed.asking("/spin", mark=file):
            killed.running(file)
            pool = killed.kill_servers()
            wait_until(lambda: not pool & killed.processes(), timeout=1, message="workers are left")
        cells["SIGKILL"] = "gone within 1 s"

        status = terminated.wait_end()
        assert status == kind.term_status
        cells["SIGTERM"] = call.outcome(answers=kind.on_term)
        cells["exit status"] = signal.Signals(-status).name if status < 0 else str(status)
        interrupted.wait_end()
        hangs = "; may hang" if kind.hangs else ""
        cells["Ctrl-C"] = other_call.outcome(answers=kind.on_interrupt) + hangs


class SlowCall:
    """A request whose call runs when the server is told to stop, and another caller in line."""

    def __init__(self, server: Server) -> None:
        self.server = server
        file = server.file()
        view = "async" if server.kind.asynchronous else "sync"
        self.answer: Future[Answer] = server.ask(f"/slow/{view}", seconds=1, mark=file)
        self.worker = server.running(file)

    def outcome(self, *, answers: bool | None) -> str:
        """What the client got, in the table's words. The server has ended."""
        answer = self.answer.result()
        output = self.server.output()
        # Ctrl-C reaches no worker.
        assert "KeyboardInterrupt" not in output, output
        if answers is None:
            return "may be cut off"
        if not answers:
            # What is then printed is the server's own.
            assert answer.status in {0, 500, 503}, output
            return "cut off"
        assert "Traceback" not in output, output
        assert answer.status == 200, output
        assert self.worker in answer.body["workers"]
        if "waiter" not in answer.body:
            return "answered"
        waiter = answer.body["waiter"]
        if not self.server.kind.notices:
            assert waiter["error"] is None
            return "answered; line served"
        assert waiter["error"].startswith("LeasePoolNotStartedError: "), waiter
        # Not when the call before it ended.
        assert waiter["at"] < answer.body["ended"], waiter
        return "answered; line refused"
