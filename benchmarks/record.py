"""``docs/benchmarks.json``: what was measured last of each group, when, where and with what.

A run may measure some groups only; each group keeps the circumstances of its own run.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .contenders import CONTENDERS
from .rounds import Cell, as_json
from .workloads import NAMES, load

__all__ = ["DATA", "Record", "read", "save"]

DATA = Path(__file__).parents[1] / "docs" / "benchmarks.json"
# What all contenders are measured with.
_AROUND = ("Django", "numpy", "uvicorn", "uvloop")


@dataclass(frozen=True)
class Record:
    """One group of one run. ``versions``: distribution → version, of all that took part."""

    date: str
    machine: str
    versions: Mapping[str, str]
    cells: Sequence[Cell]

    @property
    def circumstances(self) -> str:
        """When, where and how often, in a sentence."""
        rounds = len({cell.round for cell in self.cells})
        often = "one round" if rounds == 1 else f"{rounds} rounds"
        return f"Measured on {self.date} with {self.machine}, in {often}."


def save(cells: Sequence[Cell]) -> None:
    """Keep the measurements, in place of the former ones of the same groups."""
    date = dt.datetime.now(dt.UTC).date().isoformat()
    records = read()
    for name in dict.fromkeys(cell.group for cell in cells):
        mine = [cell for cell in cells if cell.group == name]
        records[name] = Record(date, _machine(), _versions(name), mine)
    groups = {
        name: {
            "date": record.date,
            "machine": record.machine,
            "versions": record.versions,
            "cells": as_json(record.cells),
        }
        for name, record in records.items()
    }
    DATA.write_text(json.dumps(groups, indent=1) + "\n")


def read() -> dict[str, Record]:
    """The measurements that were kept last, by group, in the order of the report."""
    if not DATA.exists():
        return {}
    groups = json.loads(DATA.read_text())
    return {
        name: Record(
            groups[name]["date"],
            groups[name]["machine"],
            groups[name]["versions"],
            [Cell(**cell) for cell in groups[name]["cells"]],
        )
        for name in NAMES
        if name in groups
    }


def _machine() -> str:
    cores = len(os.sched_getaffinity(0))
    kernel = ".".join(platform.release().split(".")[:2])
    return (
        f"Python {platform.python_version()} on {platform.system()} {kernel} {platform.machine()}, "
        f"{cores} cores{_model()}"
    )


def _model() -> str:
    """The processor's name, where the kernel gives one."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return f" of {value.strip()}"
    return ""


def _versions(name: str) -> dict[str, str]:
    """Of the group's contenders and of what they run in, those that are installed."""
    kinds = (CONTENDERS[contender].kind for contender in load(name).contenders)
    wanted = {kind.distribution for kind in kinds if kind.distribution} | set(_AROUND)
    found = {}
    for distribution in sorted(wanted, key=str.lower):
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return found
