"""Functions that take, keep, make and return large values."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.process_jobs import hold
from tests.waiting import wait_until

kept: list[Any] = []


def open_files(count: int) -> list[int]:
    """Open files and keep them; return their numbers."""
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
    kept.extend(opened)
    return opened


def are_open(numbers: list[int]) -> bool:
    """Whether the descriptors are what ``open_files`` made of them."""
    return {os.readlink(f"/proc/self/fd/{number}") for number in numbers} == {os.devnull}  # noqa: PTH115


def descriptors_left(count: int | None) -> int:
    """Let this worker open ``count`` more descriptors, or as many as ever; return its pid."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = hard
    if count is not None:
        listed = list(Path("/proc/self/fd").iterdir())
        used = {int(entry.name) for entry in listed if entry.exists()}  # not that of the listing
        limit = [number for number in range(256) if number not in used][count]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return os.getpid()


def memory_left(size: int | None) -> int:
    """Let this worker map about ``size`` more bytes, or as many as ever; return its pid."""
    limit = resource.RLIM_INFINITY
    if size is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return os.getpid()


def keep_bytes(size: int) -> None:
    """Have a large result ready."""
    kept.append(bytes(size))


def last_kept() -> Any:
    """Return what was kept last."""
    return kept[-1]


def fork_watcher(array: NDArray[np.uint8], folder: Path) -> int:
    """Leave a child that keeps ``array``; at the end it says what was in there until then."""
    child = os.fork()
    if not child:
        wait_until((folder / "go").exists, timeout=20)
        (folder / "told.new").write_text(" ".join(map(str, sorted(set(array.tolist())))))
        (folder / "told.new").rename(folder / "told")
        array[:] = 99  # nobody else's any more
        (folder / "written").touch()
        os._exit(0)
    return child


def fork_and_fill(length: int, value: float) -> tuple[NDArray[np.float64], set[str]]:
    """Make an array; say with which file of memory the child could see what is written next."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return np.full(length, value), segments()


def segments() -> set[str]:
    """The files of the segments that are mapped here, as device/number."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {"/".join(line.split()[3:5]) for line in lines if "memfd:leasepool" in line}


def file_of(found: os.stat_result) -> str:
    """The same for an open file."""
    return f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}/{found.st_ino}"


def memory_of(values: NDArray[Any]) -> memoryview:
    """Return the memory of an array, as a result that may not be sendable."""
    return values.data


def echo(value: Any) -> Any:
    """Return what came."""
    return value


def repeated(array: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """Return an array of its own, so many times as long."""
    return np.tile(array, times)


def keep(array: NDArray[np.float64]) -> float:
    """Keep a reference to the argument beyond the call."""
    kept.append(array)
    return float(array.sum())


def sums_of_kept() -> list[float]:
    """Sum what was kept, as it is now."""
    return [float(array.sum()) for array in kept]


_tables: list[Any] = []


def keep_table(table: Any) -> None:
    """Keep a table of pandas or PyArrow beyond the call."""
    _tables.append(table)


def first_values() -> list[float]:
    """The first number of each table that was kept, as it is now."""
    return [first_value(table) for table in _tables]


def first_value(table: Any) -> float:
    """The first number of a table's column ``value``."""
    return float(table["value"].to_numpy()[0])


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


def as_list(view: memoryview) -> list[Any]:
    return view.tolist()


def view_of(data: bytes) -> memoryview:
    """Return a view, which only travels with help."""
    return memoryview(data)


def is_aligned(array: NDArray[np.float64]) -> bool:
    """Whether NumPy may use its fast loops on it."""
    return bool(array.flags.aligned and array.flags.writeable)


def hold_beside(folder: Path, array: NDArray[np.float64]) -> float:
    """Be held in ``folder``, then return the sum of what came in shared memory."""
    hold(folder)
    return float(array.sum())


def shared_memory_in_use() -> int:
    """Count this process's mappings of shared memory segments."""
    return Path("/proc/self/maps").read_text().count("memfd:leasepool")


def shared_descriptors() -> int:
    """Count this process's descriptors of segments."""
    links = (entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return sum("memfd:leasepool" in _target(link) for link in links)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # the one that the listing itself had
        return ""


def shared_bytes() -> int:
    """How much memory the segments take that this process has open."""
    mapped = segments()
    opened = [entry.stat() for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    sizes = {file_of(found): found.st_blocks * 512 for found in opened}
    return sum(size for file, size in sizes.items() if file in mapped)


def no_memory_left(*_: Any) -> None:
    """Stand for ``posix_fallocate`` on a machine without memory."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def use_up_memory() -> None:
    """Be an initializer: nothing can be reserved in this worker any more."""
    os.posix_fallocate = no_memory_left
