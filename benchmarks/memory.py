"""What a process costs in memory. Imports next to nothing, so that it can weigh imports."""

from __future__ import annotations

from pathlib import Path

__all__ = ["private_memory"]


def private_memory(pid: int | str = "self") -> int:
    """Bytes of memory that belong to a process alone: what one more of its kind costs."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(
        int(line.split()[1])
        for line in text.splitlines()
        if line.startswith(("Private_Clean:", "Private_Dirty:"))
    )
