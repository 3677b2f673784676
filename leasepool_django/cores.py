"""How many processor cores this process may really use.

The default for ``WORKERS_PER_POOL`` and the yardstick of the system checks. A machine's core
count is the wrong answer in a container: CPU affinity and the quota of a control group count.
Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["quota_in_cores", "usable_cores"]

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores(root: Path = CGROUP_ROOT, membership: Path = CGROUP_MEMBERSHIP) -> int:
    """Return the number of cores this process can keep busy, at least 1.

    The smaller of the CPU affinity and the control group's quota. A quota of 2.5 cores
    counts as 2: a group that exceeds its quota is stopped as a whole, the server included.
    ``root``: where control groups are mounted; ``membership``: the file that names this
    process's groups.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # macOS and Windows have no affinity to ask for
        cores = os.cpu_count() or 1
    quota = quota_in_cores(root, membership)
    if quota is not None:
        cores = min(cores, int(quota))
    return max(1, cores)


def quota_in_cores(root: Path = CGROUP_ROOT, membership: Path = CGROUP_MEMBERSHIP) -> float | None:
    """Return the tightest CPU quota of this process's control groups, in cores.

    Reads version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``); a quota of any ancestor
    holds for its descendants. ``None``: there is none, or none that can be read.
    """
    quotas = [
        quota
        for directory in _group_directories(root, membership)
        for quota in (_quota_v2(directory), _quota_v1(directory))
        if quota is not None
    ]
    return min(quotas, default=None)


def _group_directories(root: Path, membership: Path) -> Iterator[Path]:
    """The directories of this process's CPU groups and of all their ancestors.

    In a container the path may be that of the host, which does not exist below ``root``; what is
    mounted at ``root`` itself is then this process's group, and it is always among the ancestors.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        group = PurePosixPath("/", path)
        for mount in mounts:
            for ancestor in (group, *group.parents):
                # A group outside this process's namespace is shown as "/..".
                if ".." not in ancestor.parts:
                    yield mount / ancestor.relative_to("/")


def _quota_v2(directory: Path) -> float | None:
    """``cpu.max`` holds ``"<quota> <period>"`` in microseconds, or ``"max <period>"``."""
    try:
        quota, period = (directory / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(directory: Path) -> float | None:
    """``cpu.cfs_quota_us`` per ``cpu.cfs_period_us``; -1 stands for no quota."""
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        period = int((directory / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
