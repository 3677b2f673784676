"""What ``leasepool status`` prints: what running processes say of their pools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.core.management.base import OutputWrapper

from ..engine import LeaseStats, ManagerStats, WorkerStats
from ..status import Answer
from .report import Printer, counted

__all__ = ["Overview"]

_CLEAR_SCREEN = "\x1b[H\x1b[J"
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


class Overview(Printer):
    """Prints answers, as text for people or as one line of JSON, a list.

    ``pool``: the only alias to show. ``redraws``: each print takes the place of the one before.
    """

    def __init__(
        self,
        stdout: OutputWrapper,
        stderr: OutputWrapper,
        *,
        as_json: bool,
        pool: str | None,
        redraws: bool,
    ) -> None:
        super().__init__(stdout, stderr, progress=False)
        self._as_json = as_json
        self._pool = pool
        self._redraws = redraws

    def show(self, answers: Sequence[Answer], otherwise: str = "") -> None:
        """Print ``answers``, or where there is none that, if it is text."""
        if self._as_json:
            listed = [_fields(self._selected(answer)) for answer in answers]
            self._write(self._stdout, json.dumps(listed))
            return
        parts = [_text(self._selected(answer)) for answer in answers] or [otherwise]
        text = "\n\n".join(part for part in parts if part)
        if self._redraws:
            self._write(self._stdout, f"{_CLEAR_SCREEN}{text}\n", ending="")
        elif text:
            self._write(self._stdout, text)

    def _selected(self, answer: Answer) -> Answer:
        if self._pool is None:
            return answer
        shown = {alias: stats for alias, stats in answer.pools.items() if alias == self._pool}
        return dataclasses.replace(answer, pools=shown)


def _fields(answer: Answer) -> dict[str, Any]:
    fields = dataclasses.asdict(answer)
    if answer.trouble:
        fields = {name: fields[name] for name in ("pid", "user", "trouble")}
    else:
        del fields["trouble"]
    return fields


def _text(answer: Answer) -> str:
    who = f"process {answer.pid}" if answer.pid else "a process that cannot be seen from here"
    if answer.user:
        who += f", {_line(answer.user)}"
    if answer.trouble:
        return f"({who}) {answer.trouble}"
    if not _is_here(answer.directory):
        who += f", in {_line(answer.directory)}"
    lines = [f"{_line(answer.command)} ({who}), for {_duration(answer.age)}"]
    for alias, stats in answer.pools.items():
        lines += [f"  {_line(alias)}: {_pool_line(stats)}", *_details(stats)]
    if not answer.pools:
        lines.append("  shows no pool")
    return "\n".join(lines)


def _pool_line(stats: ManagerStats) -> str:
    if stats.state == "new":
        return "not started"
    workers = sum(len(pool.workers) for pool in stats.pools)
    facts = [f"{stats.busy_workers} of {counted(workers, 'worker')} busy"]
    if len(stats.pools) != 1:
        facts.append(counted(len(stats.pools), "pool"))
    if stats.waiting:
        facts.append(f"{stats.waiting} waiting, the first for {_duration(stats.longest_wait)}")
    facts.append(counted(stats.calls_finished, "call"))
    if stats.calls_finished:
        facts[-1] += f" of {stats.mean_call_seconds:.3g} s"
    for count, what in (
        (stats.rejected, "refused"),
        (stats.leases_expired, "leases revoked"),
        (stats.workers_killed, "workers ended with their call"),
        (stats.workers_crashed, "workers crashed"),
        (stats.start_failures, "failed to start"),
    ):
        if count:
            facts.append(f"{count} {what}")
    return f"{_line(stats.state)}; {'; '.join(facts)}"


def _details(stats: ManagerStats) -> list[str]:
    lines = []
    if stats.last_start_error is not None:
        lines.append(f"    workers do not start: {_line(stats.last_start_error)}")
    workers = [worker for pool in stats.pools for worker in pool.workers]
    if workers:
        lines.append(f"    {'PID':>8}  {'STATE':8}  {'CALLS':>8}  {'SINCE':>10}  FUNCTION (OWNER)")
        lines += map(_worker_line, workers)
    lines += map(_lease_line, stats.leases)
    return lines


def _worker_line(worker: WorkerStats) -> str:
    pid = "-" if worker.pid is None else str(worker.pid)
    since = "" if worker.seconds is None else _duration(worker.seconds)
    doing = [_line(worker.function)] if worker.function is not None else []
    doing += [f"({_line(worker.owner)})"] if worker.owner is not None else []
    row = (
        f"    {pid:>8}  {_line(worker.state):8}  {worker.calls:>8}  {since:>10}  {' '.join(doing)}"
    )
    return row.rstrip()


def _lease_line(lease: LeaseStats) -> str:
    owner = "" if lease.owner is None else f" of {_line(lease.owner)}"
    expiry = "" if lease.expires_in is None else f", revoked in {_duration(lease.expires_in)}"
    return (
        f"    lease{owner}: {counted(lease.workers, 'worker')}, {lease.running} busy, "
        f"{lease.waiting} waiting, for {_duration(lease.age)}{expiry}"
    )


def _duration(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{max(seconds, 0.0):.1f} s"
    whole = int(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def _is_here(directory: str) -> bool:
    try:
        return Path.cwd() == Path(directory)
    except OSError:
        return False  # this one has been removed


def _line(text: str) -> str:
    """``text`` on one line, and harmless for a terminal: other users' programs say it."""
    if text.isprintable():
        return text
    escape = "unicode_escape"
    return "".join(c if c.isprintable() else c.encode(escape).decode() for c in text)
