"""What a process costs in memory. Imports next to nothing, so that it can weigh imports."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["make_ready", "private_memory"]


def private_memory(pid: int | str = "self") -> int:
    """Bytes of memory that belong to a process alone: what one more of its kind costs."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(
        int(line.split()[1])
        for line in text.splitlines()
        if line.startswith(("Private_Clean:", "Private_Dirty:"))
    )


def make_ready(size: int) -> None:
    """Have ``size`` bytes, or half of what is free if that is less, touched and given back.

    A virtual machine's memory is provided by its host when it is touched, at many times the cost
    of a page that is there already.
    """
    import mmap  # here: see above

    size = min(size, os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE // 2)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, size, flags=flags).close()
