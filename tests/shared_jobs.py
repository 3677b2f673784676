"""Functions that take, keep, make and return large values."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

kept: list[Any] = []


def echo(value: Any) -> Any:
    """Return what came."""
    return value


def keep(array: NDArray[np.float64]) -> float:
    """Keep a reference to the argument beyond the call."""
    kept.append(array)
    return float(array.sum())


def sums_of_kept() -> list[float]:
    """Sum what was kept, as it is now."""
    return [float(array.sum()) for array in kept]


def fill(length: int, value: float) -> NDArray[np.float64]:
    """Make an array of ``length`` times ``value``."""
    return np.full(length, value)


def overwrite(array: NDArray[np.float64]) -> float:
    """Write to the argument, which is this worker's own copy."""
    array[:] = -1.0
    return float(array.sum())


def describe(view: memoryview) -> tuple[str, int, tuple[int, ...] | None, str]:
    """Tell what kind of view came."""
    return type(view).__name__, view.nbytes, view.shape, view.format


def view_of(data: bytes) -> memoryview:
    """Return a view, which only travels with help."""
    return memoryview(data)


def is_aligned(array: NDArray[np.float64]) -> bool:
    """Whether NumPy may use its fast loops on it."""
    return bool(array.flags.aligned and array.flags.writeable)


def shared_memory_in_use() -> int:
    """Count this process's mappings of shared memory segments."""
    return Path("/proc/self/maps").read_text().count("memfd:leasepool")


def no_memory_left(*_: Any) -> None:
    """Stand for ``posix_fallocate`` on a machine without memory."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def use_up_memory() -> None:
    """Be an initializer: nothing can be reserved in this worker any more."""
    os.posix_fallocate = no_memory_left
