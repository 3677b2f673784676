"""The lifespan side of an ASGI server, for tests of applications."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["SHUTDOWN", "STARTED", "STARTUP", "STOPPED", "Message", "Server", "serving"]

Message = MutableMapping[str, Any]
Application = Callable[..., Awaitable[None]]

STARTUP: Message = {"type": "lifespan.startup"}
SHUTDOWN: Message = {"type": "lifespan.shutdown"}
STARTED: Message = {"type": "lifespan.startup.complete"}
STOPPED: Message = {"type": "lifespan.shutdown.complete"}


class Server:
    """The lifespan side of an ASGI server."""

    def __init__(self, application: Application, scope: Message | None = None) -> None:
        self.scope: Message = {"type": "lifespan", "state": {}} if scope is None else scope
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()
        self.task = asyncio.ensure_future(
            application(self.scope, self._to_app.get, self._from_app.put)
        )

    async def ask(self, message: Message) -> Message:
        """Send a message and return the answer; the task's error if it ends without one."""
        self._to_app.put_nowait(message)
        answer = asyncio.ensure_future(self._from_app.get())
        async with asyncio.timeout(20):
            await asyncio.wait({answer, self.task}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                answer.cancel()
                await self.task
                raise AssertionError("the application has returned without an answer")
        return answer.result()

    async def end(self) -> None:
        """Wait until the application has returned; it must not say more, and not raise."""
        await asyncio.wait_for(self.task, 20)
        assert self._from_app.empty()


@asynccontextmanager
async def serving(application: Application, scope: Message | None = None) -> AsyncIterator[Server]:
    server = Server(application, scope)
    assert await server.ask(STARTUP) == STARTED
    yield server
    assert await server.ask(SHUTDOWN) == STOPPED
    await server.end()
