"""The number of usable cores, from affinity and from control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from leasepool_django.cores import quota_in_cores, usable_cores

AFFINITY = len(os.sched_getaffinity(0))


class Groups:
    """A tree of control groups and the file that says which of them a process is in."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cgroup"
        self.membership = folder / "membership"

    def add(self, path: str, **files: str) -> None:
        directory = self.root / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name.replace("__", ".")).write_text(text)

    def quota(self, membership: str) -> float | None:
        self.membership.write_text(membership)
        return quota_in_cores(self.root, self.membership)

    def cores(self, membership: str) -> int:
        self.membership.write_text(membership)
        return usable_cores(self.root, self.membership)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_without_a_quota_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "none") == AFFINITY


def test_affinity_is_respected() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_the_quota_of_version_2_counts(groups: Groups) -> None:
    groups.add("system/app", cpu__max="150000 100000\n")
    assert groups.quota("0::/system/app\n") == 1.5


def test_the_tightest_ancestor_of_version_2_counts(groups: Groups) -> None:
    groups.add("", cpu__max="max 100000\n")
    groups.add("system", cpu__max="50000 100000\n")
    groups.add("system/app", cpu__max="200000 100000\n")
    assert groups.quota("0::/system/app\n") == 0.5
    assert groups.cores("0::/system/app\n") == 1


def test_no_quota_of_version_2_is_no_limit(groups: Groups) -> None:
    groups.add("app", cpu__max="max 100000\n")
    assert groups.quota("0::/app\n") is None
    assert groups.cores("0::/app\n") == AFFINITY


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_version_1_counts(groups: Groups, mount: str) -> None:
    groups.add(f"{mount}/app", cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    assert groups.quota("4:memory:/app\n3:cpu,cpuacct:/app\n0::/\n") == 2.5


def test_no_quota_of_version_1_is_no_limit(groups: Groups) -> None:
    groups.add("cpu/app", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert groups.quota("3:cpu:/app\n") is None


def test_version_2_beside_version_1_is_found(groups: Groups) -> None:
    groups.add("unified/app", cpu__max="100000 100000\n")
    assert groups.quota("0::/app\n") == 1.0


def test_in_a_container_the_hosts_path_leads_to_what_is_mounted(groups: Groups) -> None:
    groups.add("cpu", cpu__cfs_quota_us="100000\n", cpu__cfs_period_us="100000\n")
    assert groups.quota("3:cpu,cpuacct:/docker/0123456789ab\n") == 1.0


def test_a_path_outside_the_namespace_never_leaves_the_mount(groups: Groups) -> None:
    groups.add("", cpu__max="300000 100000\n")
    (groups.root.parent / "cpu.max").write_text("1 100000\n")
    assert groups.quota("0::/../other\n") == 3.0


def test_a_large_quota_does_not_add_cores(groups: Groups) -> None:
    groups.add("", cpu__max="6400000 100000\n")
    assert groups.cores("0::/\n") == AFFINITY


def test_unreadable_numbers_are_no_limit(groups: Groups) -> None:
    groups.add("", cpu__max="nonsense\n", cpu__cfs_quota_us="x", cpu__cfs_period_us="0")
    assert groups.quota("0::/\n") is None
