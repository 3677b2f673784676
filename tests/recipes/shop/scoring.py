"""CPU work that several recipes share."""

from __future__ import annotations

import random


def score_order(quantity: int, stock: int, days: int = 10_000) -> float:
    """Estimate how likely the stock is enough, from simulated days.

    Raises ``ValueError`` for an order that cannot be filled at all.
    """
    if not 0 < quantity <= 2 * stock:
        raise ValueError(f"an order of {quantity} cannot be filled from a stock of {stock}")
    chance = random.Random(quantity * 1_000_003 + stock)
    enough = sum(chance.gauss(stock, stock / 4) >= quantity for _ in range(days))
    return enough / days
