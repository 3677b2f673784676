"""Nothing listens, and no descriptor of ours is given to a program that somebody starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import process_jobs as jobs
from tests.process_pools import running
from tests.process_table import fork_servers, worker_pids

each_method = pytest.mark.parametrize("method", ["forkserver", "spawn"])

LARGE = 1 << 20  # travels in shared memory, each way


@each_method
def test_a_program_started_here_inherits_nothing_of_a_pool(method: str) -> None:
    """Not even one that is started with ``close_fds=False``."""
    before = jobs.descriptors_of_a_child()
    with running(2, mp_context=method) as manager:
        assert manager.run_sync(jobs.echo, bytes(LARGE)) == bytes(LARGE)
        assert jobs.descriptors_of_a_child() == before


@each_method
def test_a_program_started_in_a_worker_inherits_nothing(method: str) -> None:
    with running(2, mp_context=method) as manager:
        assert manager.run_sync(jobs.echo, bytes(LARGE)) == bytes(LARGE)
        for _ in range(2):
            assert manager.run_sync(jobs.descriptors_of_a_child) == []


def test_a_program_started_by_the_preparation_inherits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "starting_programs.py").write_text(
        "from tests.process_jobs import descriptors_of_a_child\nfound = descriptors_of_a_child()\n"
    )
    with running(preload=["starting_programs"]) as manager:
        assert manager.run_sync(jobs.attribute, "starting_programs", "found") == []


@each_method
def test_a_worker_has_its_own_socket_and_tray_and_nothing_else(method: str) -> None:
    """None of its siblings', of the fork server's or of the server's, but for the tray's."""
    with running(3, mp_context=method) as manager, manager.lease_sync() as lease:
        before = jobs.descriptors().values()
        for _ in range(3):
            found = lease.run_sync(jobs.descriptors)
            inherited = {number: found.pop(number) for number in (0, 1, 2)}
            assert inherited[0] == os.devnull
            kinds = sorted(target.split(":")[0] for target in found.values())
            assert kinds == ["/memfd", "pipe", "pipe", "socket"]
            assert len(set(found.values()).intersection(before)) == 3  # all but the socket
        for kind, count in ("pipe", 2), ("socket", 1):
            each = [open_files(pid, kind) for pid in worker_pids()]
            assert len(set.union(*each)) == sum(map(len, each)) == 3 * count


def sockets(pid: int) -> set[str]:
    """Return the inodes of a process's sockets."""
    return open_files(pid, "socket")


def open_files(pid: int, kind: str) -> set[str]:
    """Return the inodes of a process's sockets or pipes, without its standard streams."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue  # that of this listing
        if target.startswith(f"{kind}:[") and int(entry.name) > 2:
            found.add(target[len(kind) + 2 : -1])
    return found


NETWORK = ["tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6"]


@each_method
def test_nothing_listens_and_no_socket_has_a_name(method: str) -> None:
    """All of them are unnamed pairs, which nobody else can connect to."""
    before = sockets(os.getpid())
    with running(2, mp_context=method) as manager:
        assert manager.run_sync(jobs.echo, 1) == 1
        ours = sockets(os.getpid()) - before
        # One for each worker, the fork server's, and the housekeeper's pair.
        assert len(ours) == 5
        for pid in [*fork_servers(), *worker_pids()]:
            ours |= sockets(pid)
        for protocol in NETWORK:
            table = Path("/proc/net") / protocol
            if table.exists():
                assert not ours & {line.split()[9] for line in lines_of(table)}
        # Fields: number, references, protocol, flags, type, state, inode, and a name if it has one.
        unix = [line.split() for line in lines_of(Path("/proc/net/unix"))]
        named = {fields[6]: fields[7:] for fields in unix}
        flags = {fields[6]: fields[3] for fields in unix}
        assert ours <= named.keys()
        assert not [named[inode] for inode in ours if named[inode]]
        assert {flags[inode] for inode in ours} == {"00000000"}


def lines_of(table: Path) -> list[str]:
    return table.read_text().splitlines()[1:]
