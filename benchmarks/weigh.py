"""``python -m benchmarks.weigh CONTENDER``: what its imports add to this process, as JSON.

Imports nothing of the harness but ``memory``, and of the standard library only what Django has
loaded anyway: everything imported before is free for what is weighed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module

from benchmarks.memory import private_memory

__all__ = ["MODULES"]

MODULES = {
    "django": ("leasepool_django.asgi", "leasepool_django.shortcuts"),
    "stdlib": ("concurrent.futures.process",),
    "loky": ("loky",),
    "pebble": ("pebble",),
    "anyio": ("anyio", "anyio.to_process", "anyio._backends._asyncio"),
    "aiomultiprocess": ("aiomultiprocess",),
    "deadpool": ("deadpool",),
    "dask": ("distributed",),
    "leasepool": ("leasepool",),
}


def main(contender: str) -> dict[str, float]:
    """Set Django up, import what belongs to ``contender``, and say what that added."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.site.settings"
    os.environ["BENCH_PLAIN"] = "1"
    from django.apps import AppConfig
    from django.core.asgi import get_asgi_application
    from django.urls import get_resolver

    get_asgi_application()
    list(get_resolver().url_patterns)
    before = private_memory()
    begin = time.perf_counter()
    if contender == "django":
        # As for a name in INSTALLED_APPS.
        AppConfig.create("leasepool_django").ready()
    for module in MODULES[contender]:
        import_module(module)
    taken = time.perf_counter() - begin
    figures = {"import": 1e3 * taken, "memory": (private_memory() - before) / 1e6}
    if contender == "django":
        import asyncio

        asyncio.run(_run_once())
        figures["running"] = (private_memory() - before) / 1e6
    return figures


async def _run_once() -> None:
    from leasepool_django import pools, run_in_pool

    await pools.start_all()
    try:
        await run_in_pool(os.getpid)
    finally:
        await pools.stop_all(grace=0)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
