"""What the tests of servers saw, for the table in the documentation: ``build/servers.json``.

Each test writes its cells when it has passed; ``report`` makes the table from them.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from .kinds import KINDS, Kind

__all__ = ["FILE", "ROOT", "Rows", "environment", "observed", "read"]

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "build" / "servers.json"

Rows = dict[str, dict[str, str]]


def environment() -> dict[str, str]:
    """The versions of all that took part."""
    packages = sorted({kind.package for kind in KINDS} | {"Django"}, key=str.lower)
    return {"Python": platform.python_version(), **{name: version(name) for name in packages}}


def read() -> Rows:
    """The cells of each server; those seen with other versions do not count."""
    try:
        stored = json.loads(FILE.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    rows: Rows = stored["rows"] if stored["environment"] == environment() else {}
    return rows


@contextmanager
def observed(kind: Kind) -> Iterator[dict[str, str]]:
    """Collect cells in the block, and keep them if it ends well."""
    cells: dict[str, str] = {}
    yield cells
    rows = read()
    rows.setdefault(kind.name, {}).update(cells)
    FILE.parent.mkdir(exist_ok=True)
    draft = FILE.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    draft.replace(FILE)
