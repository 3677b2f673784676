"""README: the engine without Django settings."""

from __future__ import annotations

import asyncio

from example_project.cpu import count_primes
from leasepool_django import ExecutorBackend, LeasedExecutorManager


async def main() -> None:
    manager = LeasedExecutorManager(
        backend=ExecutorBackend.PROCESS, max_pools=1, min_pools=1, workers_per_pool=4
    )
    await manager.start()
    try:
        async with await manager.acquire(owner="cpu-primes") as lease:
            print(await asyncio.gather(*(lease.run(count_primes, n) for n in (20_000, 21_000))))
    finally:
        await manager.stop()


if __name__ == "__main__":
    asyncio.run(main())
