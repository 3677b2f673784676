"""README: a function that knows where it belongs."""

from __future__ import annotations

from leasepool_django import offload


@offload(pool="default", timeout=2.0, call_timeout=30.0)
def bits_of_factorial(number: int) -> int:
    product = 1
    for factor in range(2, number + 1):
        product *= factor
    return product.bit_length()


async def somewhere_in_a_view() -> int:
    return await bits_of_factorial.run(20_000)
