"""400 MB of objects, made when this is imported: a large model or dictionary that is preloaded."""

from __future__ import annotations

SIZE = 400_000_000
_PIECE = 1_000

# Many small objects rather than one block: their headers are what a worker must not touch.
BALLAST = [bytes([number % 256]) * _PIECE for number in range(SIZE // _PIECE)]
