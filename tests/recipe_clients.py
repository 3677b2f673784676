"""For recipes that Django's test clients are not enough for: a real server, and a WebSocket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from asgiref.testing import ApplicationCommunicator

from tests.waiting import wait_until

__all__ = ["Shop", "WebSocket", "served"]

ROOT = Path(__file__).parents[1]


class Shop:
    """The shop under uvicorn. ``log``: what the server has written."""

    def __init__(self, server: subprocess.Popen[bytes], log: Path) -> None:
        self.server = server
        self.log = log
        self.port = wait_until(self._port, timeout=30, message=log.read_text)

    def _port(self) -> int:
        assert self.server.poll() is None, self.log.read_text()
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log.read_text())
        return int(found[1]) if found else 0

    def wait_for(self, line: str) -> None:
        """Wait until the server has written ``line``."""
        wait_until(lambda: line in self.log.read_text(), message=self.log.read_text)


@contextmanager
def served(folder: Path) -> Iterator[Shop]:
    log = folder / "server.log"
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "shop.settings",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "recipes")]),
        "SHOP_MEDIA_ROOT": str(folder),
    }
    command = [sys.executable, "-m", "uvicorn", "shop.asgi:application", "--port", "0"]
    with (
        log.open("w") as stream,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT
        ) as server,
    ):
        try:
            yield Shop(server, log)
            if server.poll() is None:
                server.send_signal(signal.SIGTERM)
            server.wait(timeout=30)
        finally:
            server.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


class WebSocket:
    """A client of the consumer. ``channels.testing`` would need Daphne."""

    def __init__(self) -> None:
        from shop.consumers import ScoreConsumer

        scope = {"type": "websocket", "path": "/", "headers": [], "subprotocols": []}
        communicator: Any = ApplicationCommunicator  # it has no types
        self._consumer = communicator(ScoreConsumer.as_asgi(), scope)

    async def __aenter__(self) -> Self:
        await self._consumer.send_input({"type": "websocket.connect"})
        assert (await self._consumer.receive_output(10))["type"] == "websocket.accept"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.send_input({"type": "websocket.disconnect", "code": 1000})
        await self._consumer.wait(10)

    async def send(self, message: dict[str, int]) -> None:
        await self._consumer.send_input({"type": "websocket.receive", "text": json.dumps(message)})

    async def receive(self) -> Any:
        return json.loads((await self._consumer.receive_output(10))["text"])
