"""README: options for single calls."""

from __future__ import annotations

from example_project.cpu import count_primes
from leasepool_django import pools


async def limited() -> int:
    call = pools["default"].options(timeout=1.0, call_timeout=5.0, owner="invoice 7")
    return await call.run(count_primes, 20_000)
