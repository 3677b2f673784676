"""Which contender serves, and its life beside the server's."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..contenders import OURS, Contender, Wanted, make

__all__ = ["contender", "run", "with_contender"]

Application = Callable[..., Awaitable[None]]


def _make() -> Contender:
    name = os.environ["BENCH_CONTENDER"]
    # As many workers as this package has by default: one for each usable core.
    return make(name, Wanted(workers=len(os.sched_getaffinity(0)), defaults=name in OURS))


contender = _make()


async def run(fn: Callable[..., Any], /, *args: Any) -> Any:
    """Run a function in a worker of the contender."""
    return await contender.run(fn, *args)


def with_contender(app: Application) -> Application:
    """``app`` with the contender started before its first request and stopped after its last."""

    async def application(
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await receive()
        await contender.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await contender.stop()
        await send({"type": "lifespan.shutdown.complete"})

    return application
