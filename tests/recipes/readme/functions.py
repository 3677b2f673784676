"""README: a function for workers."""

from __future__ import annotations

import math


def count_primes(limit: int) -> int:
    return sum(
        all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
        for number in range(2, limit)
    )
