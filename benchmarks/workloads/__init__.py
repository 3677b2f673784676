"""What is measured: the groups of workloads, in the order of the report."""

from __future__ import annotations

from importlib import import_module

from .group import Group

__all__ = ["NAMES", "Group", "load"]

_MODULES = {
    "latency": "latency",
    "throughput": "throughput",
    "fairness": "fairness",
    "batch": "batch",
    "payloads": "payloads",
    "lag": "lag",
    "start": "start",
    "workers": "start",
    "ballast": "start",
    "cancel": "cancel",
    "waiting": "waiting",
    "http": "http",
    "footprint": "footprint",
}
NAMES = tuple(_MODULES)


def load(name: str) -> Group:
    """The group ``name``. Only its own module is imported: a cell needs no other."""
    if name not in _MODULES:
        raise ValueError(f"there is no group {name!r}; there are {', '.join(NAMES)}")
    groups: tuple[Group, ...] = import_module(f".{_MODULES[name]}", __name__).GROUPS
    return next(group for group in groups if group.name == name)
