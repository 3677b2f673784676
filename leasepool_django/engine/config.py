"""The frozen configuration of a manager, and its checks.

``LeasedExecutorManager`` builds one ``ManagerConfig`` from its arguments and has it checked; every
bad value is refused here, naming the argument and the value. Durations are seconds. Nothing here
starts anything.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

__all__ = ["ExecutorBackend", "ManagerConfig", "ProcessLoggingConfig", "duration", "positive_int"]


class ExecutorBackend(StrEnum):
    """The backends known by name; any other is a dotted path of an executor class."""

    PROCESS = "process"
    THREAD = "thread"
    INLINE = "inline"
    DASK = "dask"


@dataclass(frozen=True)
class ProcessLoggingConfig:
    """How log records of worker processes reach this process.

    ``level``: the lowest level forwarded; ``target_logger``: handles every record (default: the
    logger of the record's own name); ``clear_child_handlers``: whether handlers configured in the
    worker are removed, so that a record is not written twice.
    """

    enabled: bool = True
    level: int | str = logging.INFO
    target_logger: logging.Logger | str | None = None
    clear_child_handlers: bool = True


def logging_arguments(given: ProcessLoggingConfig) -> list[str]:
    """Give the names of the manager's arguments for logs that are not as they are by default."""
    usual = ProcessLoggingConfig(enabled=False)
    names = {
        "forward_process_logs": given.enabled != usual.enabled,
        "process_log_level": given.level != usual.level,
        "process_log_target_logger": given.target_logger != usual.target_logger,
        "clear_process_log_handlers": given.clear_child_handlers != usual.clear_child_handlers,
    }
    return [name for name, differs in names.items() if differs]


def positive_int(name: str, value: Any) -> int:
    """Return ``value`` if it is a true integer above zero; ``TypeError``/``ValueError`` if not."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an integer, not {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}.")
    return value


def duration(name: str, value: Any, *, minimum: float | None = None) -> float:
    """Return ``value`` (seconds) as a float if it is finite and above zero.

    With ``minimum``, a value equal to it is allowed as well. ``ValueError`` above
    ``threading.TIMEOUT_MAX`` too: no lock waits that long.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}.")
    # An integer is always finite, and may be too large for isfinite().
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number of seconds, not {value!r}.")
    if value > threading.TIMEOUT_MAX:
        raise ValueError(
            f"{name} must be at most {threading.TIMEOUT_MAX:.0f} seconds, the longest that a "
            f"thread can wait here, not {_shown(value)}."
        )
    if minimum is not None:
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum:g} seconds, not {value!r}.")
    elif value <= 0:
        raise ValueError(f"{name} must be more than 0 seconds, not {value!r}.")
    return float(value)


def _shown(value: float) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no integers of more than some thousand digits
        return f"an integer of {int(value).bit_length()} bits"


def optional_duration(name: str, value: Any) -> float | None:
    """``None``, or what ``duration`` allows."""
    return None if value is None else duration(name, value)


def why_no_size_provider(value: Any) -> str | None:
    """Why ``value`` cannot be called as the sizing rule does, or ``None`` if it can.

    Builtins that do not tell their parameters are believed.
    """
    if not callable(value):
        return "it is not callable"
    if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(value.__call__):
        return "it is a coroutine function, and is called on a thread without an event loop"
    try:
        signature = inspect.signature(value)
    except ValueError:
        return None
    try:
        signature.bind()
    except TypeError as error:
        return f"it cannot be called without arguments: {error}"
    return None


def _instance(name: str, value: Any, kinds: Any, what: str) -> None:
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {what}, not {value!r}.")


def log_level(name: str, value: Any) -> int:
    """Return the number of a logging level given as a number or a name such as ``"INFO"``."""
    if type(value) is int:
        if value >= 0:
            return value
    elif isinstance(value, str):
        number = logging.getLevelNamesMapping().get(value.upper())
        if number is not None:
            return number
    raise ValueError(f"{name} must be a logging level such as 20 or 'INFO', not {value!r}.")


class ManagerConfig(NamedTuple):
    """What a manager was asked for. See ``LeasedExecutorManager`` for the meanings."""

    max_pools: int
    min_pools: int = 1
    workers_per_pool: int = 4
    units_per_pool: int = 10
    size_provider: Callable[[], int] | None = None
    check_interval: float = 120.0
    default_lease_seconds: float = 300.0
    lease_grace_seconds: float = 15.0
    name_prefix: str = "leasepool"
    logger: logging.Logger | None = None
    process_logging: ProcessLoggingConfig = ProcessLoggingConfig(enabled=False)
    acquire_timeout: float | None = None
    max_waiting: int | None = None
    call_timeout: float | None = None
    shutdown_grace_seconds: float = 10.0

    def check(self) -> None:
        """Refuse bad values: ``TypeError`` or ``ValueError``, with the argument and the value."""
        for name in ("max_pools", "min_pools", "workers_per_pool", "units_per_pool"):
            positive_int(name, getattr(self, name))
        if self.min_pools > self.max_pools:
            raise ValueError(
                f"min_pools must not be above max_pools, but {self.min_pools} > {self.max_pools}."
            )
        if self.max_waiting is not None:
            positive_int("max_waiting", self.max_waiting)
        for name in ("check_interval", "default_lease_seconds"):
            duration(name, getattr(self, name))
        for name in ("lease_grace_seconds", "shutdown_grace_seconds"):
            duration(name, getattr(self, name), minimum=0)
        for name in ("acquire_timeout", "call_timeout"):
            optional_duration(name, getattr(self, name))
        if self.size_provider is not None:
            reason = why_no_size_provider(self.size_provider)
            if reason:
                raise TypeError(
                    f"size_provider must be a function without arguments, not "
                    f"{self.size_provider!r}: {reason}."
                )
        _instance("name_prefix", self.name_prefix, str, "a string")
        if not self.name_prefix:
            raise ValueError("name_prefix must not be empty.")
        _instance("logger", self.logger, (logging.Logger, type(None)), "a logging.Logger")
        logs = self.process_logging
        _instance("process_logging", logs, ProcessLoggingConfig, "a ProcessLoggingConfig")
        _instance("forward_process_logs", logs.enabled, bool, "true or false")
        _instance("clear_process_log_handlers", logs.clear_child_handlers, bool, "true or false")
        log_level("process_log_level", logs.level)
        _instance(
            "process_log_target_logger",
            logs.target_logger,
            (logging.Logger, str, type(None)),
            "a logger or its name",
        )
