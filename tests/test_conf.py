"""``settings.LEASEPOOL``: defaults, what is forwarded, and every mistake that is found in it."""

from __future__ import annotations

import inspect
import logging
import math
import multiprocessing
import multiprocessing.context
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.views.debug import SafeExceptionReporterFilter

from leasepool_django import ExecutorBackend, LeasedExecutorManager, pools
from leasepool_django.conf import KEYS, ProblemId, get_config, validate
from leasepool_django.cores import usable_cores
from tests.django_jobs import load

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


def only_problem(settings: Settings, value: Any) -> tuple[ProblemId, str, str]:
    settings.LEASEPOOL = value
    _, problems = validate()
    assert len(problems) == 1, problems
    return problems[0].id, problems[0].message, problems[0].hint


@pytest.mark.parametrize("value", [None, {}])
def test_without_settings_there_is_one_default_process_pool(settings: Settings, value: Any) -> None:
    settings.LEASEPOOL = value
    [(alias, config)] = get_config().items()
    assert alias == config.alias == "default"
    assert config.backend == "process"
    assert (config.max_pools, config.min_pools) == (1, 1)
    assert config.workers_per_pool == usable_cores()
    assert config.forward_logs is True
    assert config.call_timeout is None


def test_the_setting_may_be_absent(settings: Settings) -> None:
    del settings.LEASEPOOL
    assert list(get_config()) == ["default"]


def test_aliases_are_configured_one_by_one(settings: Settings) -> None:
    settings.LEASEPOOL = {
        "default": {"MAX_POOLS": 2, "WORKERS_PER_POOL": 4, "LEASE_SECONDS": 60},
        "reports": {"BACKEND": ExecutorBackend.THREAD, "WORKERS_PER_POOL": 3, "MAX_WAITING": None},
    }
    config = get_config()
    assert list(config) == ["default", "reports"]
    assert (config["default"].max_pools, config["default"].lease_seconds) == (2, 60)
    assert (config["reports"].backend, config["reports"].max_waiting) == ("thread", None)


def test_a_manager_takes_the_keyword_arguments_as_they_are(settings: Settings) -> None:
    settings.LEASEPOOL = {
        "slow": {
            "BACKEND": "thread",
            "MAX_POOLS": 3,
            "MIN_POOLS": 2,
            "WORKERS_PER_POOL": 5,
            "UNITS_PER_POOL": 7,
            "SIZE_PROVIDER": "tests.django_jobs.load",
            "CHECK_INTERVAL": 1,
            "LEASE_SECONDS": 2,
            "LEASE_GRACE_SECONDS": 0,
            "ACQUIRE_TIMEOUT": None,
            "MAX_WAITING": 9,
            "CALL_TIMEOUT": 4.5,
            "SHUTDOWN_GRACE_SECONDS": 0,
            "LOG_LEVEL": "WARNING",
            "OPTIONS": {"thread_name_prefix": "slow"},
        }
    }
    kwargs = get_config()["slow"].manager_kwargs()
    assert inspect.unwrap(kwargs["size_provider"]) is load
    assert LeasedExecutorManager(**kwargs).workers_per_pool == 5
    del kwargs["size_provider"]
    assert kwargs.pop("hooks") == "leasepool_django.backends.django_thread"
    assert kwargs == {
        "backend": "thread",
        "max_pools": 3,
        "min_pools": 2,
        "workers_per_pool": 5,
        "units_per_pool": 7,
        "check_interval": 1.0,
        "default_lease_seconds": 2.0,
        "lease_grace_seconds": 0.0,
        "name_prefix": "leasepool-slow",
        "forward_process_logs": False,  # threads log in this process already
        "process_log_level": logging.WARNING,
        "acquire_timeout": None,
        "max_waiting": 9,
        "call_timeout": 4.5,
        "shutdown_grace_seconds": 0.0,
        "thread_name_prefix": "slow",
    }


def test_every_default_is_one_that_its_own_check_accepts() -> None:
    for name, key in KEYS.items():
        if key.default is not None:
            assert key.check(name, key.default) == key.default


def test_executor_classes_get_objects_for_names(settings: Settings) -> None:
    settings.LEASEPOOL = {
        "default": {
            "BACKEND": "concurrent.futures.ProcessPoolExecutor",
            "OPTIONS": {"initializer": "tests.django_jobs.load", "mp_context": "spawn"},
        }
    }
    kwargs = get_config()["default"].manager_kwargs()
    assert kwargs["initializer"] is load
    assert kwargs["mp_context"] is multiprocessing.get_context("spawn")


STANDARD = "concurrent.futures.ProcessPoolExecutor"


class Renamed(Executor):
    """Calls its number of workers by another name."""

    def __init__(self, threads: int) -> None: ...

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        ("thread", {"initializer": load, "initargs": 5}, "initargs must be a tuple or list"),
        ("thread", {"initializer": 5}, "initializer must be callable, not 5"),
        ("thread", {"initializer": "tests.no_such_module.f"}, "ModuleNotFoundError"),
        (STANDARD, {"initargs": "pa55"}, "initargs must be a tuple or list, not of type str"),
        (STANDARD, {"max_tasks_per_child": "3"}, "max_tasks_per_child must be an integer, not '3'"),
        (STANDARD, {"mp_context": "forked"}, "mp_context = 'forked'"),
        (STANDARD, {"mp_context": multiprocessing.context.SpawnContext}, "SpawnContext"),
        (Renamed, {}, "Renamed cannot be made with max_workers and OPTIONS: .*'threads'"),
    ],
)
def test_what_an_executor_class_would_refuse_at_the_start_is_refused_before(
    settings: Settings, backend: Any, options: dict[str, Any], said: str
) -> None:
    settings.LEASEPOOL = {"default": {"BACKEND": backend, "OPTIONS": options}}
    config = get_config()["default"]
    with pytest.raises((TypeError, ValueError), match=said):
        config.manager_kwargs()
    with pytest.raises(ImproperlyConfigured, match=said):
        _ = pools["default"]


def test_an_initializer_whose_module_raises_is_a_mistake_in_the_settings(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_initializer.py").write_text("raise RuntimeError('no licence found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings.LEASEPOOL = {
        "default": {"BACKEND": "thread", "OPTIONS": {"initializer": "raising_initializer.run"}}
    }
    with pytest.raises(ImproperlyConfigured, match="RuntimeError: no licence found") as raised:
        _ = pools["default"]
    assert "'raising_initializer.run'" in str(raised.value)


def test_an_executor_class_may_be_given_itself(settings: Settings) -> None:
    settings.LEASEPOOL = {"default": {"BACKEND": ThreadPoolExecutor}}
    assert get_config()["default"].backend is ThreadPoolExecutor


def test_options_do_not_show(settings: Settings) -> None:
    settings.LEASEPOOL = {
        "default": {"BACKEND": "thread", "OPTIONS": {"initializer": load, "initargs": ["pa55"]}}
    }
    config = get_config()["default"]
    assert "pa55" not in repr(config)
    # Error reports look into tuples, mappings and lists that a frame has as a variable.
    assert "pa55" not in repr(SafeExceptionReporterFilter().cleanse_setting("config", config))


COUNTS = [name for name, key in KEYS.items() if key.problem is ProblemId.BAD_COUNT]
DURATIONS = [name for name, key in KEYS.items() if key.problem is ProblemId.BAD_DURATION]
OPTIONAL = [name for name, key in KEYS.items() if key.optional]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", [1]])
def test_a_count_is_a_true_positive_integer(settings: Settings, name: str, value: Any) -> None:
    found, message, _ = only_problem(settings, {"default": {name: value}})
    assert found is ProblemId.BAD_COUNT
    assert f"LEASEPOOL['default']['{name}']" in message
    assert repr(value) in message


@pytest.mark.parametrize("name", DURATIONS)
@pytest.mark.parametrize(
    "value", [-1, math.inf, math.nan, True, "5", 1e10, pytest.param(10**400, id="huge")]
)
def test_a_duration_is_a_finite_number(settings: Settings, name: str, value: Any) -> None:
    found, message, _ = only_problem(settings, {"default": {name: value}})
    assert found is ProblemId.BAD_DURATION
    assert f"LEASEPOOL['default']['{name}']" in message
    assert repr(value) in message


@pytest.mark.parametrize("name", DURATIONS)
def test_a_grace_may_be_nothing_and_other_durations_may_not(settings: Settings, name: str) -> None:
    settings.LEASEPOOL = {"default": {name: 0}}
    _, problems = validate()
    assert bool(problems) is not name.endswith("GRACE_SECONDS")


@pytest.mark.parametrize("name", KEYS)
def test_none_is_allowed_where_there_may_be_no_limit(settings: Settings, name: str) -> None:
    settings.LEASEPOOL = {"default": {name: None}}
    _, problems = validate()
    assert bool(problems) is (name not in OPTIONAL)


@pytest.mark.parametrize(
    ("value", "expected", "quoted", "hint"),
    [
        ([], ProblemId.NOT_A_MAPPING, "not of type list", "'default'"),
        ({"default": 4}, ProblemId.NOT_A_MAPPING, "LEASEPOOL['default']", "'default'"),
        ({"default": "secret"}, ProblemId.NOT_A_MAPPING, "not of type str.", "'default'"),
        ({"MAX_POOLS": 4}, ProblemId.NOT_A_MAPPING, "'MAX_POOLS'", "{'default': {'MAX_POOLS'"),
        ({3: {}}, ProblemId.BAD_ALIAS, "3", "'reports'"),
        ({"": {}}, ProblemId.BAD_ALIAS, "''", "'reports'"),
        ({"default": {"MAX_POOL": 3}}, ProblemId.UNKNOWN_KEY, "'MAX_POOL'", "'MAX_POOLS'?"),
        ({"default": {"max_pools": 3}}, ProblemId.UNKNOWN_KEY, "'max_pools'", "'MAX_POOLS'?"),
        ({"default": {"COLOUR": 3}}, ProblemId.UNKNOWN_KEY, "'COLOUR'", "Known keys: BACKEND"),
        (
            {"default": {"BACKEND": "thread", "INITIALIZER": "a.b"}},
            ProblemId.UNKNOWN_KEY,
            "'INITIALIZER'",
            "OPTIONS['initializer']",
        ),
        (
            {"default": {"MIN_POOLS": 3, "MAX_POOLS": 2}},
            ProblemId.MIN_ABOVE_MAX,
            "MIN_POOLS is 3, above MAX_POOLS, which is 2",
            "MAX_POOLS is the limit",
        ),
        ({"default": {"MIN_POOLS": 3}}, ProblemId.MIN_ABOVE_MAX, "1 (the default)", "limit"),
        ({"default": {"BACKEND": "proces"}}, ProblemId.UNKNOWN_BACKEND, "'proces'", "BACKEND"),
        ({"default": {"BACKEND": "no.such"}}, ProblemId.UNKNOWN_BACKEND, "'no.such'", "BACKEND"),
        ({"default": {"BACKEND": "json.dumps"}}, ProblemId.UNKNOWN_BACKEND, "json.dumps", ""),
        ({"default": {"BACKEND": "..x"}}, ProblemId.UNKNOWN_BACKEND, "'..x'", "BACKEND"),
        (
            {"default": {"BACKEND": "concurrent.futures.Executor"}},
            ProblemId.UNKNOWN_BACKEND,
            "abstract",
            "BACKEND",
        ),
        (
            {"default": {"BACKEND": "leasepool_django.backends.executor.ExecutorClassBackend"}},
            ProblemId.UNKNOWN_BACKEND,
            "has no name",
            "BACKEND",
        ),
        ({"default": {"BACKEND": 7}}, ProblemId.UNKNOWN_BACKEND, "7", ""),
        ({"default": {"FORWARD_LOGS": "yes"}}, ProblemId.BAD_FLAG, "'yes'", "LOG_LEVEL"),
        ({"default": {"PUBLISH_STATUS": 1}}, ProblemId.BAD_FLAG, "1", "leasepool status"),
        ({"default": {"LOG_LEVEL": "LOUD"}}, ProblemId.BAD_LOG_LEVEL, "'LOUD'", "LOG_LEVEL"),
        ({"default": {"OPTIONS": ["x"]}}, ProblemId.BAD_OPTIONS, "not list", "keyword arguments"),
        (
            {"default": {"OPTIONS": {1: "secret"}}},
            ProblemId.BAD_OPTIONS,
            "keys [1].",
            "keyword arguments",
        ),
        (
            {"default": {"BACKEND": "thread", "OPTIONS": {"initialiser": load}}},
            ProblemId.UNKNOWN_OPTION,
            "'initialiser'",
            "'initializer'?",
        ),
        (
            {"default": {"BACKEND": "thread", "OPTIONS": {"colour": 1}}},
            ProblemId.UNKNOWN_OPTION,
            "'colour'",
            "Its options: context, hooks, initargs, initializer, thread_name_prefix",
        ),
        (
            {"default": {"OPTIONS": {"max_pools": 2}}},
            ProblemId.UNKNOWN_OPTION,
            "'max_pools'",
            "'MAX_POOLS' instead",
        ),
        (
            {"default": {"OPTIONS": {"context": ["a.b"]}, "CONTEXT": []}},
            ProblemId.UNKNOWN_OPTION,
            "'context'",
            "'CONTEXT' instead",
        ),
        (
            {"default": {"OPTIONS": {"name_prefix": "x"}}},
            ProblemId.UNKNOWN_OPTION,
            "'name_prefix'",
            "backend",
        ),
        (
            {"default": {"OPTIONS": {"mp_context": "fork"}}},
            ProblemId.FORK_REFUSED,
            "'fork'",
            "'forkserver'",
        ),
        (
            {"default": {"OPTIONS": {"mp_context": multiprocessing.get_context("fork")}}},
            ProblemId.FORK_REFUSED,
            "'fork'",
            "'forkserver'",
        ),
        (
            {"default": {"SIZE_PROVIDER": "tests.django_jobs.lode"}},
            ProblemId.BAD_SIZE_PROVIDER,
            "'tests.django_jobs.lode'",
            "whole number",
        ),
        (
            {"default": {"SIZE_PROVIDER": "tests.django_jobs.NOT_CALLABLE"}},
            ProblemId.BAD_SIZE_PROVIDER,
            "'tests.django_jobs.NOT_CALLABLE'",
            "whole number",
        ),
        (
            {"default": {"SIZE_PROVIDER": "tests.django_jobs.double"}},
            ProblemId.BAD_SIZE_PROVIDER,
            "'tests.django_jobs.double': it cannot be called without arguments: missing",
            "whole number",
        ),
        (
            {"default": {"SIZE_PROVIDER": "asyncio.sleep"}},
            ProblemId.BAD_SIZE_PROVIDER,
            "'asyncio.sleep': it is a coroutine function",
            "whole number",
        ),
    ],
)
def test_a_mistake_is_named_with_its_value_and_a_hint(
    settings: Settings, value: Any, expected: ProblemId, quoted: str, hint: str
) -> None:
    found, message, found_hint = only_problem(settings, value)
    assert found is expected
    assert quoted in message
    assert hint in found_hint


def test_all_mistakes_are_listed_at_once(settings: Settings) -> None:
    settings.LEASEPOOL = {
        "default": {"MAX_POOL": 3, "CHECK_INTERVAL": "2"},
        "reports": {"BACKEND": "nothing"},
    }
    with pytest.raises(ImproperlyConfigured) as raised:
        get_config()
    text = str(raised.value)
    assert "3 mistakes" in text
    for expected in ("MAX_POOL", "CHECK_INTERVAL", "'nothing'", "E003", "E005", "E007"):
        assert expected in text


def test_one_mistake_is_one_sentence(settings: Settings) -> None:
    settings.LEASEPOOL = {"default": {"MAX_POOLS": 0}}
    with pytest.raises(ImproperlyConfigured, match=r"must be at least 1, not 0.*E004") as raised:
        get_config()
    assert "\n" not in str(raised.value)
