"""The CPU work of the example site: what runs inside the workers.

Every function here is at module level, takes and returns only plain data, and knows nothing of
requests. That is all a function needs in order to run in a worker. Called plainly, each of them
does the same work in the caller's own process.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
import platform
import random
import reprlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from django.utils import formats, timezone, translation

_SCORE_MEAN = 20.0
_SCORE_DEVIATION = 5.0
_SCORE_STEPS = 100_000
_ORDER_TRIALS = 5_000
# With these one order keeps a worker busy for a few seconds at most.
_MAX_LINES = 200
_MAX_STOCK = 5_000


def count_primes(limit: int) -> int:
    """Return how many primes are smaller than ``limit``, found by trial division.

    A sieve would be faster; trial division keeps a core busy with plain Python, which is the point.
    """
    if limit <= 2:
        return 0
    count = 1
    for candidate in range(3, limit, 2):
        for divisor in range(3, math.isqrt(candidate) + 1, 2):
            if candidate % divisor == 0:
                break
        else:
            count += 1
    return count


def calculate_score(payload: Mapping[str, float]) -> float:
    """Return the share, 0 to 1, of a normal population (mean 20, deviation 5) below the value.

    ``payload["value"]`` is the value. The integral is computed by Simpson's rule in plain Python.
    Raises ``KeyError`` without a value and ``ValueError`` when it is not a finite number.
    """
    value = float(payload["value"])
    if not math.isfinite(value):
        raise ValueError(f"the value must be a finite number, not {value!r}")
    end = (value - _SCORE_MEAN) / _SCORE_DEVIATION
    end = max(-40.0, min(40.0, end))
    step = end / _SCORE_STEPS
    total = 1.0 + math.exp(-end * end / 2)
    for index in range(1, _SCORE_STEPS):
        x = index * step
        total += (4 if index % 2 else 2) * math.exp(-x * x / 2)
    return 0.5 + total * step / 3 / math.sqrt(2 * math.pi)


def score_order(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Estimate how likely an order can be delivered in full while other customers buy too.

    ``payload`` is ``{"order": "A-17", "lines": [{"sku": "lamp", "quantity": 3, "stock": 8,
    "price": 19.5}, ...]}``. Each of a few thousand trials lets other customers take a random part
    of the stock; ``score`` is the share of trials, 0 to 1, that leave enough for every line. The
    same order always gets the same score. Raises ``ValueError`` when the order has no such lines,
    or more than one call should work on.
    """
    name = payload.get("order")
    if not isinstance(name, str | int | None):
        raise ValueError('"order" must be text or a whole number')
    lines = _order_lines(payload)
    seed = json.dumps([name, lines])
    chance = random.Random(seed)  # noqa: S311 - an estimate that can be repeated, not a secret
    delivered = 0
    for _ in range(_ORDER_TRIALS):
        for quantity, stock, _price in lines:
            taken = sum(chance.random() < 0.3 for _ in range(stock))
            if stock - taken < quantity:
                break
        else:
            delivered += 1
    total = sum(quantity * price for quantity, _stock, price in lines)
    return {
        "order": name,
        "total": round(total, 2),
        "score": delivered / _ORDER_TRIALS,
    }


def _order_lines(payload: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    lines = payload.get("lines")
    if not isinstance(lines, list) or not lines:
        raise ValueError('an order needs a list of "lines" with at least one line')
    if len(lines) > _MAX_LINES:
        raise ValueError(f"an order of {len(lines)} lines is too long: {_MAX_LINES} at most")
    found: list[tuple[int, int, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            quantity, stock, price = int(line["quantity"]), int(line["stock"]), float(line["price"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f'line {number} needs the numbers "quantity", "stock" and "price",'
                f" not {reprlib.repr(line)}"
            ) from error
        if not (0 < quantity <= 1000 and 0 <= stock <= 1000 and 0 <= price <= 1_000_000):
            raise ValueError(
                f"line {number} is out of range: quantity 1 to 1000, stock 0 to 1000,"
                " price 0 to 1,000,000"
            )
        found.append((quantity, stock, price))
    stocks = sum(stock for _quantity, stock, _price in found)
    if stocks > _MAX_STOCK:
        raise ValueError(f"the stock of all lines is {stocks}: {_MAX_STOCK} at most")
    return found


@dataclass(frozen=True)
class Compressed:
    """A file made small: its sizes in bytes, the SHA-256 of the original, the compressed bytes."""

    original_size: int
    sha256: str
    data: bytes

    @property
    def compressed_size(self) -> int:
        """The size of the compressed bytes."""
        return len(self.data)

    @property
    def percent(self) -> float:
        """The compressed size as a percentage of the original; 100 for an empty original."""
        if not self.original_size:
            return 100.0
        return 100 * self.compressed_size / self.original_size


def digest_and_compress(data: bytes) -> Compressed:
    """Hash ``data`` and compress it in the ``.xz`` format."""
    return Compressed(
        original_size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        data=lzma.compress(data),
    )


@dataclass(frozen=True)
class Timed:
    """A result, the id of the process that computed it, and the seconds it took there."""

    result: Any
    pid: int
    seconds: float


def timed(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Timed:
    """Call ``fn`` and say where and how long it ran. ``fn`` travels to the worker by its name."""
    start = time.perf_counter()
    result = fn(*args, **kwargs)
    return Timed(result, os.getpid(), time.perf_counter() - start)


def slow_count(seconds: float) -> int:
    """Keep one core busy for ``seconds`` of wall-clock time; return how far it counted."""
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        count += 1
    return count


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself, as seen from inside a call."""

    pid: int
    python: str
    language: str
    time_zone: str
    now: str


def worker_facts() -> WorkerFacts:
    """Return the worker's process id and what the caller's language and time zone make of now."""
    return WorkerFacts(
        pid=os.getpid(),
        python=platform.python_version(),
        language=translation.get_language() or "none",
        time_zone=timezone.get_current_timezone_name(),
        now=formats.date_format(timezone.localtime(), "l, j F Y, H:i"),
    )
