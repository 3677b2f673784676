"""``settings.LEASEPOOL``, read and judged: the only module that reads it.

``get_config()`` gives the handler one ``AliasConfig`` per alias, or raises with every
mistake listed. ``validate()`` gives the same mistakes one by one to the system checks. Nothing
here starts anything. Of the user's modules those are imported that ``BACKEND``, ``SIZE_PROVIDER``
and ``CONTEXT`` name, and for executor classes that of the ``initializer``.

Long because one place holds every key: its default, its check, what it becomes, and its hint.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from enum import Enum, StrEnum, unique
from functools import cache, wraps
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

from django.conf import ENVIRONMENT_VARIABLE, settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from .backends.base import BUILT_IN, Backend, resolve
from .backends.process.carriers import Carriers
from .cores import usable_cores
from .engine import LeasedExecutorManager
from .engine.config import duration, log_level, positive_int, why_no_size_provider
from .exceptions import UnsupportedBackendError

__all__ = [
    "AliasConfig",
    "Problem",
    "ProblemId",
    "aliases",
    "get_config",
    "project_name",
    "validate",
]

SETTING = "LEASEPOOL"
DEFAULT_ALIAS = "default"
WORKER_HOOKS = "leasepool_django.backends.process.django_worker"
HOOKS = {  # of backends with others
    "inline": "leasepool_django.backends.django_inline",
    "thread": "leasepool_django.backends.django_thread",
}


# Where a server and its workers share the cores, pages that need no worker would otherwise wait for
# calls as long as a time slice; see docs/benchmarks.md, HTTP.
DEFAULT_NICE = 10


@unique
class ProblemId(StrEnum):
    """Every id a system check of this package can report, with what it stands for."""

    NOT_A_MAPPING = "leasepool.E001"  # LEASEPOOL or one of its aliases
    BAD_ALIAS = "leasepool.E002"
    UNKNOWN_KEY = "leasepool.E003"
    BAD_COUNT = "leasepool.E004"
    BAD_DURATION = "leasepool.E005"
    MIN_ABOVE_MAX = "leasepool.E006"
    UNKNOWN_BACKEND = "leasepool.E007"
    BAD_FLAG = "leasepool.E008"
    BAD_LOG_LEVEL = "leasepool.E009"
    BAD_OPTIONS = "leasepool.E010"  # OPTIONS is not a mapping with string keys
    UNKNOWN_OPTION = "leasepool.E011"
    FORK_REFUSED = "leasepool.E012"
    BAD_SIZE_PROVIDER = "leasepool.E013"
    BAD_INITIALIZER = "leasepool.E014"
    BAD_PRELOAD = "leasepool.E015"
    REFUSED_BY_BACKEND = "leasepool.E016"
    BAD_CONTEXT = "leasepool.E017"
    TOO_MANY_WORKERS = "leasepool.W001"
    ASGI_NOT_WRAPPED = "leasepool.W002"
    RECYCLING_DEADLOCKS = "leasepool.W003"
    NO_NICE_ON_ONE_CORE = "leasepool.W004"
    TOO_MANY_SERVER_PROCESSES = "leasepool.W005"
    FORKS_THE_SERVER = "leasepool.W006"
    NO_DEFAULT_ALIAS = "leasepool.W007"


class Problem(NamedTuple):
    """One mistake: ``message`` quotes the key and the value, ``hint`` says what to do."""

    id: ProblemId
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.message} {self.hint} ({self.id})"


class AliasConfig(SimpleNamespace):
    """One alias of ``settings.LEASEPOOL``, checked and complete. Durations are seconds."""

    alias: str
    backend: str | type
    max_pools: int
    min_pools: int
    workers_per_pool: int
    units_per_pool: int
    size_provider: Callable[[], int] | None
    check_interval: float
    lease_seconds: float
    lease_grace_seconds: float
    acquire_timeout: float | None
    max_waiting: int | None
    call_timeout: float | None
    shutdown_grace_seconds: float
    forward_logs: bool
    log_level: int
    publish_status: bool
    context: tuple[str, ...]
    options: Mapping[str, Any]

    def __repr__(self) -> str:
        """Without ``options``, whose ``initargs`` may hold secrets."""
        shown = [f"{name}={value!r}" for name, value in vars(self).items() if name != "options"]
        return f"{type(self).__name__}({', '.join(shown)})"

    def with_options(self, options: Mapping[str, Any]) -> AliasConfig:
        """Return the same with other options."""
        return AliasConfig(**{**vars(self), "options": options})

    def manager_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of ``LeasedExecutorManager`` for this alias."""
        backend = resolve(self.backend)
        options = dict(self.options)
        if self.context and "context" in (backend.option_names() or ()):
            options["context"] = self.context
        executor_class = getattr(backend, "executor_class", None)
        if executor_class is not None:
            _make_objects(options)
            own = {name: options[name] for name in options if name not in ("context", "hooks")}
            _judge_executor_options(executor_class, own if backend.supports_hooks else options)
        if backend.supports_hooks:
            options.setdefault("hooks", HOOKS.get(backend.name, WORKER_HOOKS))
        if backend.name == "process" and options.get("scheduling") != "idle":
            options.setdefault("nice", DEFAULT_NICE)
        return {
            "backend": self.backend,
            "max_pools": self.max_pools,
            "min_pools": self.min_pools,
            "workers_per_pool": self.workers_per_pool,
            "units_per_pool": self.units_per_pool,
            "size_provider": self.size_provider,
            "check_interval": self.check_interval,
            "default_lease_seconds": self.lease_seconds,
            "lease_grace_seconds": self.lease_grace_seconds,
            "name_prefix": f"leasepool-{self.alias}",
            "forward_process_logs": self.forward_logs and backend.supports_log_forwarding,
            "process_log_level": self.log_level,
            "acquire_timeout": self.acquire_timeout,
            "max_waiting": self.max_waiting,
            "call_timeout": self.call_timeout,
            "shutdown_grace_seconds": self.shutdown_grace_seconds,
            **options,
        }


def _make_objects(options: dict[str, Any]) -> None:
    """Put objects where settings have names, for executor classes that know no names."""
    initializer = options.get("initializer")
    if isinstance(initializer, str):
        try:
            options["initializer"] = import_string(initializer)
        except Exception as error:  # the module is the user's, and may raise anything
            raise ValueError(
                f"initializer = {initializer!r} cannot be imported: "
                f"{type(error).__name__}: {error}."
            ) from error
    method = options.get("mp_context")
    if isinstance(method, str):
        from multiprocessing import get_context  # see _is_context

        try:
            options["mp_context"] = get_context(method)
        except ValueError as error:
            raise ValueError(f"mp_context = {method!r}: {error}.") from error


def _judge_executor_options(executor_class: type[Executor], options: Mapping[str, Any]) -> None:
    """Refuse what the constructor of an executor class, or its workers, would refuse later.

    None is made: a ``ProcessPoolExecutor`` starts the resource tracker of ``multiprocessing``, and
    other classes may start anything.
    """
    try:
        inspect.signature(executor_class).bind(max_workers=1, **options)
    except TypeError as error:
        raise TypeError(
            f"{executor_class.__qualname__} cannot be made with max_workers and OPTIONS: {error}."
        ) from error
    if not _is_of_the_standard_library(executor_class):
        return
    initializer = options.get("initializer")
    if initializer is not None and not callable(initializer):
        raise TypeError(f"initializer must be callable, not {_short(initializer)}.")
    if not isinstance(options.get("initargs", ()), (tuple, list)):
        # Not its value, which may be secret.
        kind = type(options["initargs"]).__name__
        raise TypeError(f"initargs must be a tuple or list, not of type {kind}.")
    if options.get("max_tasks_per_child") is not None:
        positive_int("max_tasks_per_child", options["max_tasks_per_child"])
    if options.get("mp_context") is not None and not _is_context(options["mp_context"]):
        raise TypeError(
            "mp_context must be a multiprocessing context or its name, not "
            f"{_short(options['mp_context'])}."
        )


def _is_context(value: object) -> bool:
    from multiprocessing.context import BaseContext  # a tenth of this module's imports

    return isinstance(value, BaseContext)


def _is_of_the_standard_library(executor_class: type[Executor]) -> bool:
    """Whether it is one of its executor classes, or a subclass."""
    if issubclass(executor_class, ThreadPoolExecutor):
        return True
    from concurrent.futures import ProcessPoolExecutor  # loads much that threads do not need

    return issubclass(executor_class, ProcessPoolExecutor)


def _size_provider(name: str, value: Any) -> Callable[[], int]:
    target = value
    if isinstance(value, str):
        try:
            target = import_string(value)
        except Exception as error:
            raise ValueError(
                f"{name} = {value!r} cannot be imported: {type(error).__name__}: {error}."
            ) from error
    reason = why_no_size_provider(target)
    if reason:
        raise TypeError(
            f"{name} must be a function without arguments, or its dotted path, not "
            f"{_short(value)}: {reason}."
        )
    return _with_fresh_connections(target)


def _with_fresh_connections(provider: Callable[[], int]) -> Callable[[], int]:
    """Close connections that are too old or broken before and after, as around a request.

    The thread that asks for the load has no requests, and lives as long as the manager.
    """

    @wraps(provider)
    def load() -> int:
        from django.db import close_old_connections  # not before Django is set up

        close_old_connections()
        try:
            return provider()
        finally:
            close_old_connections()

    return load


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {_short(value)}.")
    return value


def _context(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(path, str) for path in value):
        raise TypeError(f"{name} must be a list of dotted paths, not {_short(value)}.")
    mistakes = []
    for path in value:
        try:
            Carriers([path])
        except (TypeError, ValueError) as error:
            mistakes.append(error)
    if mistakes:
        raise ValueError(f"{name}: {' '.join(map(str, mistakes))}") from mistakes[0]
    return tuple(value)


def _not_negative(name: str, value: Any) -> float:
    return duration(name, value, minimum=0)


class _Key(NamedTuple):
    """A key of an alias: its field, default, the function that checks it, and what to report."""

    field: str
    default: Any
    check: Callable[[str, Any], Any]
    problem: ProblemId
    hint: str
    optional: bool = False


def _count(field_name: str, default: Any, *, optional: bool = False) -> _Key:
    hint = "Use a whole number of at least 1" + (", or None for no limit." if optional else ".")
    return _Key(field_name, default, positive_int, ProblemId.BAD_COUNT, hint, optional)


def _seconds(
    field_name: str,
    default: float | None,
    *,
    optional: bool = False,
    check: Callable[[str, Any], float] = duration,
) -> _Key:
    hint = "Use a number of seconds" + (", or None for no limit." if optional else ".")
    return _Key(field_name, default, check, ProblemId.BAD_DURATION, hint, optional)


CONTEXT_HINT = "Name ContextVar objects, or others with capture() and apply(), by dotted path."
SIZE_HINT = "Name a function without arguments that returns the current load as a whole number."
STATUS_HINT = "manage.py leasepool status shows the alias unless it is False."
LOGS_HINT = "Log records of workers from LOG_LEVEL up reach this process, unless it is False."

# The default of WORKERS_PER_POOL is None here: the usable cores, asked for when it is needed.
KEYS: Mapping[str, _Key] = MappingProxyType(
    {
        "MAX_POOLS": _count("max_pools", 1),
        "MIN_POOLS": _count("min_pools", 1),
        "WORKERS_PER_POOL": _count("workers_per_pool", None),
        "UNITS_PER_POOL": _count("units_per_pool", 10),
        "SIZE_PROVIDER": _Key(
            "size_provider", None, _size_provider, ProblemId.BAD_SIZE_PROVIDER, SIZE_HINT, True
        ),
        "CHECK_INTERVAL": _seconds("check_interval", 120.0),
        "LEASE_SECONDS": _seconds("lease_seconds", 300.0),
        "LEASE_GRACE_SECONDS": _seconds("lease_grace_seconds", 15.0, check=_not_negative),
        "ACQUIRE_TIMEOUT": _seconds("acquire_timeout", 30.0, optional=True),
        "MAX_WAITING": _count("max_waiting", 1000, optional=True),
        "CALL_TIMEOUT": _seconds("call_timeout", None, optional=True),
        "SHUTDOWN_GRACE_SECONDS": _seconds("shutdown_grace_seconds", 10.0, check=_not_negative),
        "FORWARD_LOGS": _Key("forward_logs", True, _flag, ProblemId.BAD_FLAG, LOGS_HINT),
        "PUBLISH_STATUS": _Key("publish_status", True, _flag, ProblemId.BAD_FLAG, STATUS_HINT),
        "CONTEXT": _Key("context", (), _context, ProblemId.BAD_CONTEXT, CONTEXT_HINT),
        "LOG_LEVEL": _Key("log_level", logging.INFO, log_level, ProblemId.BAD_LOG_LEVEL, LOGS_HINT),
    }
)
OTHER_KEYS = ("BACKEND", "OPTIONS")


def get_config() -> dict[str, AliasConfig]:
    """Return alias → configuration; without settings there is one alias, ``"default"``.

    Raises ``ImproperlyConfigured``, listing every mistake.
    """
    configs, problems = validate()
    if not problems:
        return configs
    text = str(problems[0])
    if len(problems) > 1:
        listed = "\n".join(f"- {problem}" for problem in problems)
        text = f"settings.{SETTING} has {len(problems)} mistakes:\n{listed}"
    raise ImproperlyConfigured(text)


def aliases() -> list[str]:
    """Return the aliases in ``settings.LEASEPOOL``, with and without mistakes inside."""
    value = _setting()
    if not isinstance(value, Mapping):
        return []
    return [alias for alias, entry in value.items() if _is_alias(alias, entry)]


def project_name() -> str:
    """Return what all processes of a project have in common: the name of the settings module.

    Empty where ``settings.configure()`` was called instead.
    """
    # Not settings.SETTINGS_MODULE, which is gone while a test overrides a setting.
    return os.environ.get(ENVIRONMENT_VARIABLE, "")


def _setting() -> Any:
    value = getattr(settings, SETTING, None)
    return {DEFAULT_ALIAS: {}} if value is None or value == {} else value


def _is_alias(alias: Any, entry: Any) -> bool:
    return isinstance(alias, str) and bool(alias) and isinstance(entry, Mapping)


def validate(*, mend: bool = False) -> tuple[dict[str, AliasConfig], list[Problem]]:
    """Judge ``settings.LEASEPOOL`` as a whole; ``None`` and ``{}`` mean the defaults.

    Returns the configurations of the aliases that are correct, and all problems of the others.
    With ``mend`` there are those with mistakes in ``KEYS``, too, with the defaults in their places:
    for their options to be judged, not to be used.
    """
    value = _setting()
    if not isinstance(value, Mapping):
        problem = Problem(
            ProblemId.NOT_A_MAPPING,
            f"{SETTING} must be a dictionary of aliases, not of type {type(value).__name__}.",
            f"For example {SETTING} = {{'default': {{'WORKERS_PER_POOL': 4}}}}.",
        )
        return {}, [problem]
    configs: dict[str, AliasConfig] = {}
    problems: list[Problem] = []
    for alias, entry in value.items():
        if not isinstance(alias, str) or not alias:
            problems.append(
                Problem(
                    ProblemId.BAD_ALIAS,
                    f"The alias {_short(alias)} in {SETTING} is not a non-empty string.",
                    "Aliases name managers, such as 'default' or 'reports'.",
                )
            )
        elif not isinstance(entry, Mapping):
            hint = f"Write {SETTING} = {{{alias!r}: {{...}}}}."
            if alias in {*KEYS, *OTHER_KEYS}:
                hint = (
                    f"Settings belong to an alias: {SETTING} = {{'default': {{{alias!r}: ...}}}}."
                )
            problems.append(
                Problem(
                    ProblemId.NOT_A_MAPPING,
                    # Not the value, which may be secret.
                    f"{SETTING}[{alias!r}] must be a dictionary, not of type "
                    f"{type(entry).__name__}.",
                    hint,
                )
            )
        else:
            config, found = _validate_alias(alias, entry)
            problems.extend(found)
            if config is not None and (mend or not found):
                configs[alias] = config
    return configs, problems


def _validate_alias(
    alias: str, entry: Mapping[Any, Any]
) -> tuple[AliasConfig | None, list[Problem]]:
    where = f"{SETTING}[{alias!r}]"
    problems = list(_unknown_keys(where, entry))
    fields: dict[str, Any] = {}
    wrong: set[str] = set()
    for name, key in KEYS.items():
        value = entry.get(name, key.default)
        if name not in entry or (key.optional and value is None):
            fields[key.field] = value
            continue
        try:
            fields[key.field] = key.check(f"{where}[{name!r}]", value)
        except (TypeError, ValueError) as error:
            problems.append(Problem(key.problem, str(error), key.hint))
            wrong.add(name)
            fields[key.field] = key.default
    if fields["workers_per_pool"] is None:
        fields["workers_per_pool"] = usable_cores()
    if fields["min_pools"] > fields["max_pools"]:
        if not wrong & {"MIN_POOLS", "MAX_POOLS"}:
            default = "" if "MAX_POOLS" in entry else " (the default)"
            problems.append(
                Problem(
                    ProblemId.MIN_ABOVE_MAX,
                    f"{where}: MIN_POOLS is {fields['min_pools']}, above MAX_POOLS, which is "
                    f"{fields['max_pools']}{default}.",
                    "MIN_POOLS pools are started with the server, MAX_POOLS is the limit.",
                )
            )
        fields["min_pools"] = fields["max_pools"]
    backend = entry.get("BACKEND", "process")
    options = entry.get("OPTIONS", {})
    in_backend = list(_backend_problems(where, backend, options))
    problems.extend(in_backend)
    if in_backend:
        return None, problems
    if isinstance(backend, Enum):
        backend = backend.value
    in_options = list(_option_problems(where, backend, options))
    problems.extend(problem for _, problem in in_options)
    refused = {name for name, _ in in_options}
    if refused and backend not in BUILT_IN:  # one that may need what has another name
        return None, problems
    options = MappingProxyType({name: options[name] for name in options if name not in refused})
    return AliasConfig(alias=alias, backend=backend, options=options, **fields), problems


def _unknown_keys(where: str, entry: Mapping[Any, Any]) -> Iterator[Problem]:
    known = (*OTHER_KEYS, *KEYS)
    for key in entry:
        if key in known:
            continue
        close = difflib.get_close_matches(str(key).upper(), known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(known)}."
        if str(key).lower() in (_option_names(entry.get("BACKEND", "process")) or ()):
            hint = f"It is an option of the backend: write it as OPTIONS[{str(key).lower()!r}]."
        yield Problem(ProblemId.UNKNOWN_KEY, f"{where} has the unknown key {_short(key)}.", hint)


def _backend_problems(where: str, backend: Any, options: Any) -> Iterator[Problem]:
    try:
        resolve(backend)
    except UnsupportedBackendError as error:
        yield Problem(
            ProblemId.UNKNOWN_BACKEND,
            f"{where}['BACKEND'] = {_short(backend)}: {error}",
            "Without BACKEND, work runs in worker processes.",
        )
    names = list(options) if isinstance(options, Mapping) else None
    if names is None or not all(isinstance(name, str) for name in names):
        # Not the values, which may be secret.
        given = type(options).__name__ if names is None else f"one with the keys {_short(names)}"
        yield Problem(
            ProblemId.BAD_OPTIONS,
            f"{where}['OPTIONS'] must be a dictionary with string keys, not {given}.",
            "It holds keyword arguments for the backend, such as {'initializer': 'shop.setup'}.",
        )


def _option_problems(
    where: str, backend: Any, options: Mapping[str, Any]
) -> Iterator[tuple[str, Problem]]:
    """Options that the backend does not have or must not be given, with what to say of each."""
    known = _option_names(backend)
    for name in options:
        if name in _manager_parameters():
            key = next((key for key, spec in KEYS.items() if spec.field == name), None)
            hint = f"Use the key {key!r} instead." if key else "OPTIONS go to the backend alone."
        elif name == "context" and name in (known or ()):
            hint = "Use the key 'CONTEXT' instead."
        elif known is not None and name not in known:
            close = difflib.get_close_matches(name.lower(), sorted(known), n=1)
            hint = (
                f"Did you mean {close[0]!r}?"
                if close
                else f"Its options: {', '.join(sorted(known)) or 'none'}."
            )
        else:
            continue
        text = f"{where}['OPTIONS'] has {name!r}, which is not an option of the backend "
        yield name, Problem(ProblemId.UNKNOWN_OPTION, f"{text}{_short(backend)}.", hint)
    method = options.get("mp_context")
    if method is not None and _is_context(method):
        method = method.get_start_method()
    if isinstance(method, str) and method == "fork":
        problem = Problem(
            ProblemId.FORK_REFUSED,
            f"{where}['OPTIONS']['mp_context'] asks for 'fork', which is refused: forking a "
            "threaded server copies its locks, listening sockets and database connections.",
            "Leave it out, or use 'forkserver' or 'spawn'; 'preload' shares memory as fork does.",
        )
        yield "mp_context", problem


def _option_names(backend: Any) -> frozenset[str] | None:
    """The options of a backend; ``None`` if they, or the backend itself, cannot be known."""
    try:
        backend_class: type[Backend] = resolve(backend)
    except UnsupportedBackendError:
        return None
    return backend_class.option_names()


@cache
def _manager_parameters() -> frozenset[str]:
    parameters = inspect.signature(LeasedExecutorManager).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def _short(value: object) -> str:
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 100
    return shortened.repr(value)
